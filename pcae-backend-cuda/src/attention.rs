//! Attention, forward and backward.
