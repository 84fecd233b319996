"""Everything with a socket. Empty until the HTTP server lands; `AsyncLLM` is what it stands on."""
