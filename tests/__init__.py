"""A package, so that `tests.cases` is found here: torch-fidelity installs a package `tests` too."""
