//! `taod` closes the loop from a production query log to a promoted adapter.
//!
//! Data flows one way, and so do the imports (a test reads the `use crate::` lines and refuses an upward one):
//!
//! ```text
//! query_log -> ingest -> table -> dataset -> candidates -> rewards -> adapter -> gate -> registry -> endpoint
//! ```
//!
//! Reading order: [`record`] is what flows; the stages follow in the order of the loop; [`round`] names them all;
//! [`daemon`] wires everything. The shape and its reasons stand in `ARCHITECTURE.md`.

// Leaves: used by every stage, use nothing of ours.
pub mod durable;
pub mod health;
pub mod metrics;
pub mod progress;
pub mod record;
pub mod secret;

// Stages, in the order of the flow.
pub mod adapter;
pub mod candidates;
pub mod dataset;
pub mod endpoint;
pub mod engine;
pub mod gate;
pub mod query_log;
pub mod registry;
pub mod rewards;
pub mod serve;
pub mod table;

// What an operator sets, made of the stages' own settings.
pub mod config;

// Drivers: the only code that knows several stages at once.
pub mod erasure;
pub mod ingest;
pub mod round;
pub mod schedule;

// Shell.
pub mod admin;
pub mod cli;
pub mod daemon;
pub mod demo;
