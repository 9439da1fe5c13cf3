//! What inference needs: `impl Backend for Cuda`.
