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
//!
//! Without the feature `daemon` only [`json`], [`record`] and [`query_log::format`] are built.

// Leaves: used by every stage, use nothing of ours.
#[cfg(feature = "daemon")]
pub mod crash;
#[cfg(feature = "daemon")]
pub mod durable;
#[cfg(feature = "daemon")]
pub mod health;
pub mod json;
#[cfg(feature = "daemon")]
pub mod layout;
#[cfg(feature = "daemon")]
pub mod metrics;
#[cfg(feature = "daemon")]
pub mod notify;
#[cfg(feature = "daemon")]
pub mod progress;
pub mod record;
#[cfg(feature = "daemon")]
pub mod secret;
#[cfg(feature = "daemon")]
pub mod signature;

// Stages, in the order of the flow.
#[cfg(feature = "daemon")]
pub mod adapter;
#[cfg(feature = "daemon")]
pub mod candidates;
#[cfg(feature = "daemon")]
pub mod dataset;
#[cfg(feature = "daemon")]
pub mod endpoint;
#[cfg(feature = "daemon")]
pub mod engine;
#[cfg(feature = "daemon")]
pub mod gate;
pub mod query_log;
#[cfg(feature = "daemon")]
pub mod registry;
#[cfg(feature = "daemon")]
pub mod reward_model;
#[cfg(feature = "daemon")]
pub mod rewards;
#[cfg(feature = "daemon")]
pub mod serve;
#[cfg(feature = "daemon")]
pub mod table;
#[cfg(feature = "daemon")]
pub mod telemetry;

// What an operator sets, made of the stages' own settings.
#[cfg(feature = "daemon")]
pub mod config;

// Drivers: the only code that knows several stages at once.
#[cfg(feature = "daemon")]
pub mod audit;
#[cfg(feature = "daemon")]
pub mod erasure;
#[cfg(feature = "daemon")]
pub mod ingest;
#[cfg(feature = "daemon")]
pub mod round;
#[cfg(feature = "daemon")]
pub mod schedule;

// Shell.
#[cfg(feature = "daemon")]
pub mod admin;
#[cfg(feature = "daemon")]
pub mod cli;
#[cfg(feature = "daemon")]
pub mod daemon;
#[cfg(feature = "daemon")]
pub mod demo;
#[cfg(feature = "daemon")]
pub mod doctor;
#[cfg(feature = "daemon")]
pub mod simulate;
