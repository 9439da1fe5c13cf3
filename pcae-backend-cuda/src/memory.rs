//! How much memory a task takes, before it takes any.
