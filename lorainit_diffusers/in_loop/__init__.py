"""How an initialisation lives inside a training loop that knows nothing of it.

:mod:`handoff` lets `initialize` take its losses from a loop that it does not run, :mod:`rewind` gives the loop back the
batches and random numbers that the pass took, :mod:`still` holds everything else in place meanwhile, and
:mod:`written` sees to what is saved. :mod:`lorainit_diffusers.attach` puts them together.
"""
