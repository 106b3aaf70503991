"""Training data: folders of pairs, patches, targets, augmentation, synthetic images."""
