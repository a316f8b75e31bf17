"""PURE leaf: canonical bytes, hashes, signatures, proofs. No IO, clock or entropy; everything above may import it."""
