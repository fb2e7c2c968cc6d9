"""Other nodes: who they are (identity, mTLS), how they come in (join), how one asks them
something (mesh), and whether they live (heartbeats)."""
