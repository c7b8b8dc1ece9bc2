"""A client of OCI registries: references, credentials, blobs and manifests."""
