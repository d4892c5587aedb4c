//! Every Prometheus metric of taod, declared in one place.
//!
//! Names are `taod_<noun>_<unit>[_total]`. A label is an enum, so the number of series is known when the process starts
//! and no text of a log (a prompt, a user, a topic) can become a label. Every series exists from the start at zero, so
//! that a rate over the first event is right and a dashboard shows "none" instead of "no data".
//!
//! A leaf: the drivers and the daemon set what they know; the stages themselves return numbers and know no metric.

mod instrument;
mod labels;

pub use instrument::{By, Current, Instrument};
pub use labels::*;

use prometheus::process_collector::ProcessCollector;
use prometheus::{Counter, Encoder, Gauge, Histogram, IntCounter, IntGauge, Registry, TextEncoder};

/// Declares a group of metrics: a struct with one field each, and how it is registered.
macro_rules! group {
    ($(#[$doc:meta])* $group:ident { $($field:ident: $kind:ty = $name:literal, $help:literal;)* }) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $group { $(#[doc = $help] pub $field: $kind,)* }

        impl $group {
            fn declare(registry: &Registry) -> prometheus::Result<Self> {
                Ok($group { $($field: Instrument::declare(registry, $name, $help)?,)* })
            }
        }
    };
}

group! {
    /// What the ingestion read and stored.
    Ingest {
        rows: IntCounter = "taod_ingest_rows_total", "Rows committed to the queries table.";
        bytes: IntCounter = "taod_ingest_bytes_total", "Bytes of the Kafka records whose rows were committed.";
        dead_letters: By<Reason, IntCounter> = "taod_ingest_dead_letters_total",
            "Records that could not be read, by reason; their bytes are in the dead_letters table.";
        skips: By<Reason, IntCounter> = "taod_ingest_skips_total", "Records that hold no call, by reason.";
        lag_offsets: IntGauge = "taod_ingest_lag_offsets",
            "Offsets between the ends of the assigned partitions and what the table holds.";
        lag_seconds: Gauge = "taod_ingest_lag_seconds",
            "Age of the newest stored record of the partition that is furthest behind; 0 when nothing is left to store.";
        data_age_seconds: Gauge = "taod_ingest_data_age_seconds", "Age of the newest record that this process stored, by its time stamp in Kafka.";
        partitions: IntGauge = "taod_ingest_assigned_partitions", "Partitions that this process reads.";
        commits: By<Commit, IntCounter> = "taod_ingest_commits_total", "Commits to the table, by how they ended.";
        commit_seconds: Histogram = "taod_ingest_commit_seconds",
            "Time from sealing an epoch to its commit being durable.";
        retries: IntCounter = "taod_ingest_retries_total", "Times the ingestion started again after an error.";
    }
}

group! {
    /// The maintenance of the tables.
    Maintenance {
        files: IntGauge = "taod_maintenance_table_files", "Data files of all tables after the latest maintenance.";
        log_entries: IntGauge = "taod_maintenance_log_entries",
            "Log entries since the checkpoint, of the table that has most, after the latest maintenance.";
        seconds: By<MaintenanceTask, Gauge> = "taod_maintenance_task_seconds",
            "Time each task of the latest maintenance took, over all tables.";
        tasks: By<MaintenanceOutcome, IntCounter> = "taod_maintenance_tasks_total",
            "Tasks of maintenance, one for each table, by how they ended.";
        rewritten: IntCounter = "taod_maintenance_rewritten_bytes_total", "Bytes that compaction wrote.";
        removed: IntCounter = "taod_maintenance_removed_files_total",
            "Files removed: replaced long enough ago, or never committed.";
    }
}

group! {
    /// What the rounds do.
    Rounds {
        ended: By<RoundOutcome, IntCounter> = "taod_round_ends_total", "Rounds that ended, by outcome.";
        stage: By<Stage, IntGauge> = "taod_round_stage_state", "1 for the stage that runs now, 0 for the others.";
        progress: Gauge = "taod_round_progress_ratio", "Part of the running stage that is done, from 0 to 1.";
        stage_seconds: By<Stage, Gauge> = "taod_round_stage_seconds", "Time each stage of the latest round took.";
        tokens: By<Stage, IntCounter> = "taod_round_tokens_total", "Tokens sampled, scored or trained, by stage.";
        prompts: By<Split, IntGauge> = "taod_round_dataset_prompts", "Prompts in the latest dataset, by split.";
        excluded: IntGauge = "taod_round_excluded_rows", "Rows that the latest dataset left out, for any reason.";
        shift: By<Feature, Gauge> = "taod_round_population_shift_nats",
            "Population stability index of the latest round's new held-out prompts against those of the rounds before, by feature.";
        shifted: By<Feature, IntGauge> = "taod_round_population_shifted_state",
            "1 where the feature's index passes dataset.population.index and what chance explains, else 0.";
        last_start: Gauge = "taod_round_start_timestamp_seconds", "When the latest round started.";
        last_end: Gauge = "taod_round_end_timestamp_seconds", "When the latest round ended.";
        next_start: Gauge = "taod_round_next_timestamp_seconds", "When the next round is due.";
    }
}

group! {
    /// What the scorers said about the candidates of the latest round.
    Rewards {
        answers: IntCounter = "taod_reward_answers_total", "Answers scored.";
        mean: Gauge = "taod_reward_mean_ratio", "Mean training reward of the candidates, from 0 to 1.";
        passed: Gauge = "taod_reward_pass_ratio", "Part of the candidates that passed every hard rule.";
        anchor_shift: Gauge = "taod_reward_anchor_shift_ratio",
            "How far the scorer that moved most scores its anchors from the first time, in standard deviations over them.";
        anchor_moved: IntGauge = "taod_reward_anchor_moved_state", "1 where that is further than rewards.anchors.shift, else 0.";
        best: Gauge = "taod_reward_best_ratio", "Mean over prompts of the best candidate's reward.";
    }
}

group! {
    /// How the training goes.
    Training {
        steps: IntCounter = "taod_training_steps_total", "Optimizer steps taken.";
        tokens: IntCounter = "taod_training_tokens_total", "Completion tokens trained on.";
        loss: Gauge = "taod_training_loss_nats", "Loss of the latest step, per token.";
        kl: Gauge = "taod_training_kl_nats", "KL divergence from the base at the latest measurement, per token.";
        entropy: Gauge = "taod_training_entropy_nats", "Entropy of the policy at the latest measurement, per token.";
        ratio: Gauge = "taod_training_policy_ratio",
            "Mean ratio of the policy to the one that training began from, over the latest step's tokens.";
        clipped: Gauge = "taod_training_clipped_ratio", "Part of the latest step's tokens whose ratio was clipped.";
        effective: Gauge = "taod_training_effective_sample_ratio",
            "Effective sample size as a part of the samples, under the weights that make up for the sampler.";
        length: Gauge = "taod_training_answer_tokens", "Mean length of the latest step's answers.";
        gradient: Gauge = "taod_training_gradient_norm", "Gradient norm of the latest step, before clipping.";
        learning_rate: Gauge = "taod_training_learning_rate", "Learning rate of the latest step.";
    }
}

group! {
    /// The open trial, and how trials ended.
    Gate {
        open: IntGauge = "taod_gate_open_trials", "Trials that are open now.";
        wealth: Gauge = "taod_gate_wealth_nats", "Natural logarithm of the open trial's wealth (its evidence).";
        bar: Gauge = "taod_gate_bar_nats", "Natural logarithm of the wealth at which the open trial is decided.";
        gain: Gauge = "taod_gate_gain_ratio", "Mean gain of the challenger over the incumbent in the open trial.";
        prompts: IntCounter = "taod_gate_prompts_total", "Held-out prompts used up by trials.";
        trial_prompts: IntGauge = "taod_gate_trial_prompts", "Held-out prompts that the open trial has used.";
        guardrails: By<Guardrail, IntGauge> = "taod_gate_guardrail_state",
            "Guardrails of the open trial: 1 holds, 0 cannot say yet, -1 fails.";
        trials: By<TrialOutcome, IntCounter> = "taod_gate_trials_total", "Trials that ended, by outcome.";
    }
}

group! {
    /// What is served.
    Endpoint {
        current: Current = "taod_endpoint_current_info", "The promoted adapter version, as a label of the value 1.";
        proof: IntGauge = "taod_endpoint_proof_state", "Whether the latest proof of what is served passed: 1 or 0.";
        proof_time: Gauge = "taod_endpoint_proof_timestamp_seconds", "When the latest proof was made.";
        promotions: By<Promotion, IntCounter> = "taod_endpoint_promotions_total", "Changes of what is served.";
        frozen: IntGauge = "taod_endpoint_promotions_frozen_state",
            "1 while a freeze holds, so that nothing is trained, judged or promoted, else 0.";
        errors: IntCounter = "taod_endpoint_errors_total", "Requests to the endpoint that failed.";
    }
}

group! {
    /// The process as a whole.
    Daemon {
        build: Current = "taod_daemon_build_info", "The version of taod, as a label of the value 1.";
        ready: IntGauge = "taod_daemon_ready_state", "1 when nothing stands in the way of the work, else 0.";
        lease: IntGauge = "taod_daemon_lease_state", "1 when this process owns rounds and promotion, else 0.";
        errors: By<Part, IntCounter> = "taod_daemon_errors_total", "Errors that were retried, by part.";
        notices: By<Delivery, IntCounter> = "taod_daemon_notices_total",
            "Notices for the destinations of `notifications`, one for each of them, by whether they arrived.";
        up_seconds: Counter = "taod_daemon_up_seconds_total", "Time since the start, counted by the main loop.";
    }
}

/// All metrics of one process.
#[derive(Debug)]
pub struct Metrics {
    pub ingest: Ingest,
    pub maintenance: Maintenance,
    pub rounds: Rounds,
    pub rewards: Rewards,
    pub training: Training,
    pub gate: Gate,
    pub endpoint: Endpoint,
    pub daemon: Daemon,
    registry: Registry,
}

impl Metrics {
    /// Declares every metric on a registry of its own. An error means that two metrics share a name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let process = i32::try_from(std::process::id()).unwrap_or_default();
        registry.register(Box::new(ProcessCollector::new(process, "taod")))?;
        let metrics = Metrics {
            ingest: Ingest::declare(&registry)?,
            maintenance: Maintenance::declare(&registry)?,
            rounds: Rounds::declare(&registry)?,
            rewards: Rewards::declare(&registry)?,
            training: Training::declare(&registry)?,
            gate: Gate::declare(&registry)?,
            endpoint: Endpoint::declare(&registry)?,
            daemon: Daemon::declare(&registry)?,
            registry,
        };
        metrics.daemon.build.set(env!("CARGO_PKG_VERSION"));
        Ok(metrics)
    }

    /// Returns all values in Prometheus' text format.
    pub fn render(&self) -> prometheus::Result<String> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_exists_at_zero_from_the_start() {
        let text = Metrics::new().unwrap().render().unwrap();
        assert!(text.contains("taod_ingest_rows_total 0\n"), "{text}");
        for reason in Reason::ALL {
            let line = format!("taod_ingest_dead_letters_total{{reason=\"{}\"}} 0\n", reason.as_str());
            assert!(text.contains(&line), "{line} is not in {text}");
        }
        assert!(text.contains(&format!("taod_daemon_build_info{{version=\"{}\"}} 1\n", env!("CARGO_PKG_VERSION"))));
    }

    #[test]
    fn a_value_lands_on_its_own_label() {
        let metrics = Metrics::new().unwrap();
        metrics.gate.trials.get(TrialOutcome::Refused).inc();
        metrics.gate.guardrails.get(Guardrail::Quality).set(-1);
        let text = metrics.render().unwrap();
        assert!(text.contains("taod_gate_trials_total{outcome=\"refused\"} 1\n"), "{text}");
        assert!(text.contains("taod_gate_trials_total{outcome=\"promoted\"} 0\n"), "{text}");
        assert!(text.contains("taod_gate_guardrail_state{guardrail=\"quality\"} -1\n"), "{text}");
    }

    #[test]
    fn only_one_version_is_current() {
        let metrics = Metrics::new().unwrap();
        metrics.endpoint.current.set("v1");
        metrics.endpoint.current.set("v2");
        let text = metrics.render().unwrap();
        assert!(!text.contains("v1") && text.contains("taod_endpoint_current_info{version=\"v2\"} 1\n"), "{text}");
    }
}
