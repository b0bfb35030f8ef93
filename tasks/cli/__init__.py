"""Code that all scripts share: options, errors in one line, the machine, files written whole."""
