"""What selectors and mergers share: a name, parameters that check themselves, and a registry of names."""
