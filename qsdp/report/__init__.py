"""What a run tells of itself: metrics, progress, tables and plots."""
