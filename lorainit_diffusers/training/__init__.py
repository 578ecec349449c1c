"""What the training scripts share and needs no command line: numbers, data, the best step, the files of a run."""
