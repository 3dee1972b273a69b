"""The kinds of candidates, a module each: how one is settled, built and initialised."""
