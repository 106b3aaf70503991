"""The only room with Qt, magicgui and napari: what a person sees."""
