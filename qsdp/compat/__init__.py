"""The only room that touches private names of torch, for torch 2.11 to 2.14.

Nothing is patched, and except for ``set_comms``, ``set_partial_reduce_output`` and ``abandon_pass``
everything only reads. What is read is what the public seam (``FSDPModule.set_custom_all_gather``,
``set_custom_reduce_scatter``) does not say: which parameters a group holds and in which order, and
the objects to restore when the hooks are removed.
"""
