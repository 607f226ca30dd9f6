//! RAFS images: one image's tree of files, read from its bootstrap.
