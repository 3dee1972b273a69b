"""Parameters to start from, and the files of a workspace; data of the package, no code."""
