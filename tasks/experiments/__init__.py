"""The paper's protocol as data: manifests, their runs, and the tables and figures of what was measured."""
