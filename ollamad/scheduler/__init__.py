"""One request's life: find who can answer, run it here or forward it, relay the stream."""
