//! Properties of whole datasets, frozen from real tables: every row accounted for, no order dependence, decisions that
//! last, no leak.

mod decisions;
mod files;
mod filters;
mod leaks;
mod synthetic;
mod world;
