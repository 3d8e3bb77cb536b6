"""Data sets: what lies in their folders, decoded, shuffled, augmented and handed over as bytes."""
