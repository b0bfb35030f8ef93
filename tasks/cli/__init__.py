"""What every script shares: options, errors in one line, the machine, files written whole."""
