"""How an initialisation lives inside a training loop that knows nothing of it.

`handoff` lets `initialize` take its losses from a loop that it does not run, `rewind` gives the loop back the
batches and random numbers that the pass took, `still` holds everything else in place meanwhile, and
`written` sees to what is saved. `lorainit_diffusers.attach` puts them together.
"""
