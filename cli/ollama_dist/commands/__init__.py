"""The commands, one module for each group. Their functions import what they need."""
