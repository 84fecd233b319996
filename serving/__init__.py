"""Everything with a socket. It needs the `serve` extra: `pip install "kvjax[serve]"`."""
