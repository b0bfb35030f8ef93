"""The training tasks, one folder each; scripts call them, and they call the library."""
