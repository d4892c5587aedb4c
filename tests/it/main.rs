//! The integration tests: one binary, so that it links once. A subject is a file, a case is a few lines.

mod harness;

mod bench_train;
mod cli;
mod config;
mod dashboards;
mod docs;
mod ingest;
mod layers;
mod metrics;
mod readers;
mod training;
