"""The embedded image-caption pairs; README.md says where they are from."""
