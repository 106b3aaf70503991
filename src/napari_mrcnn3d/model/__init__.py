"""The network: a 3D Mask R-CNN in the vocabulary of torchvision."""
