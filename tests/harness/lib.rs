//! Starts real exo processes for the end-to-end tests.
