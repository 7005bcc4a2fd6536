"""What a release must hold: the wheel, the source distribution, and both at work outside the checkout."""
