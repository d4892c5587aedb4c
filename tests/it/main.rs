//! The integration tests: one binary, so that it links once. A subject is a file, a case is a few lines.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on ends; clippy's own setting covers only #[test] functions"
)]

mod harness;

mod accelerators;
mod alerts;
mod audit;
mod bad_input;
mod bad_tables;
mod bench_commit;
mod bench_train;
mod chaos;
mod cli;
mod clock;
mod config;
mod crash;
mod dashboards;
mod deploy;
mod docs;
mod erase;
mod faults;
mod gate;
mod hub;
mod ingest;
mod injections;
mod instances;
mod judged;
mod kafka_bad_input;
mod kafka_group;
mod kafka_late;
mod kafka_security;
mod layers;
mod manual;
mod metrics;
mod operations;
mod own_requests;
mod page_browser;
mod page_tls;
mod power_loss;
mod prometheus;
mod promotion;
mod readers;
mod remote;
mod reward_models;
mod round;
mod schemathesis;
mod security;
mod servers;
mod signed;
mod simulate;
mod spark;
mod stores;
mod synthetic;
mod systemd;
mod tables;
mod topics;
mod trainers;
mod training;
mod unit_sandbox;
mod units;
mod vllm;
mod vllm_relay;
mod vllm_server;
