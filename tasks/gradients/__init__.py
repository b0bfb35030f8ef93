"""Gradients of a run of any task: how alike they are (Table 1), and how long (Figure 1)."""
