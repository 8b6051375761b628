"""Tests of several processes over gloo."""
