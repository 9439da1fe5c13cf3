//! What training adds: `impl TrainBackend for Cuda`.
