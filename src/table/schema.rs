//! The tables: their columns, and what readers and writers must know about each column.
//!
//! One [`TableSpec`] is the only description of a table. The Arrow schema, the Delta schema, the writer's settings and
//! the statistics follow from it. Structure that is rich and small lives as JSON text in a column of its own.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use serde_json::{Value, json};

/// What a column holds, which decides its types and how it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Bool,
    Int,
    Long,
    Double,
    /// Microseconds since the epoch, UTC.
    Time,
    Date,
    /// A name from a small set: dictionary-encoded.
    Word,
    /// A hash or an identifier, mostly unique.
    Id,
    /// Text of the log: never in statistics, no dictionary.
    Text,
    /// Any JSON value, stored as text.
    Json,
    /// A JSON object with every field of a row that has no column of its own.
    Rest,
    Ints,
    Floats,
    Bytes,
}

/// One column.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    pub name: &'static str,
    pub kind: Kind,
    pub required: bool,
    /// True where the minimum and maximum of each file stand in the log, to skip files by. Never for text of the log.
    pub stats: bool,
}

/// One table.
#[derive(Debug)]
pub struct TableSpec {
    pub name: &'static str,
    pub columns: &'static [Column],
}

/// A column that every row fills.
const fn required(name: &'static str, kind: Kind) -> Column {
    Column { name, kind, required: true, stats: false }
}

/// A column that may be null.
const fn optional(name: &'static str, kind: Kind) -> Column {
    Column { name, kind, required: false, stats: false }
}

/// The same column with its bounds in the log.
const fn skip_by(column: Column) -> Column {
    Column { stats: true, ..column }
}

/// Every logged call, once.
pub static QUERIES: TableSpec = TableSpec {
    name: "queries",
    columns: &[
        skip_by(required("topic", Kind::Word)),
        skip_by(required("partition", Kind::Int)),
        skip_by(required("offset", Kind::Long)),
        required("record_index", Kind::Int),
        optional("key", Kind::Bytes),
        optional("headers", Kind::Json),
        skip_by(optional("kafka_time", Kind::Time)),
        skip_by(required("event_time", Kind::Time)),
        skip_by(required("ingest_date", Kind::Date)),
        required("kind", Kind::Word),
        optional("request_id", Kind::Id),
        optional("trace_id", Kind::Id),
        optional("conversation_id", Kind::Id),
        optional("workload", Kind::Word),
        optional("tenant", Kind::Word),
        optional("model", Kind::Word),
        optional("served_version", Kind::Word),
        optional("user_hash", Kind::Word),
        required("status", Kind::Int),
        optional("duration_ms", Kind::Double),
        required("messages", Kind::Json),
        required("params", Kind::Json),
        optional("tools", Kind::Json),
        optional("response", Kind::Text),
        optional("finish_reason", Kind::Word),
        optional("prompt_tokens", Kind::Long),
        optional("completion_tokens", Kind::Long),
        optional("feedback", Kind::Json),
        required("prompt_hash", Kind::Id),
        optional("language", Kind::Word),
        required("format", Kind::Word),
        required("redacted", Kind::Bool),
        required("train_ok", Kind::Bool),
        optional("reason", Kind::Word),
        required("sample_weight", Kind::Double),
        required("truncated", Kind::Bool),
        required("taod_version", Kind::Word),
        required("config_hash", Kind::Word),
        required("extra", Kind::Json),
    ],
};

/// Records that no format could read, byte for byte.
pub static DEAD_LETTERS: TableSpec = TableSpec {
    name: "dead_letters",
    columns: &[
        skip_by(required("topic", Kind::Word)),
        skip_by(required("partition", Kind::Int)),
        skip_by(required("offset", Kind::Long)),
        required("record_index", Kind::Int),
        optional("key", Kind::Bytes),
        optional("headers", Kind::Json),
        skip_by(optional("kafka_time", Kind::Time)),
        skip_by(required("ingest_date", Kind::Date)),
        required("payload", Kind::Bytes),
        required("reason", Kind::Word),
        required("message", Kind::Text),
        required("taod_version", Kind::Word),
        required("config_hash", Kind::Word),
    ],
};

/// Which split each prompt cluster belongs to, for ever.
pub static SPLITS: TableSpec = TableSpec {
    name: "splits",
    columns: &[
        required("prompt_hash", Kind::Id),
        required("cluster", Kind::Id),
        required("split", Kind::Word),
        required("round", Kind::Word),
        // Since 0.2: what later prompts are compared with. Rows without a number are placed again under the same decision.
        optional("number", Kind::Long),
        optional("twin", Kind::Id),
        optional("context", Kind::Long),
        optional("text", Kind::Long),
        optional("conversation", Kind::Long),
        optional("start", Kind::Long),
        optional("tail", Kind::Long),
        optional("sketch", Kind::Bytes),
        optional("chars", Kind::Long),
        optional("fault", Kind::Word),
        optional("masked", Kind::Word),
        optional("language", Kind::Word),
        optional("has_tools", Kind::Bool),
        optional("system", Kind::Long),
        optional("scan", Kind::Long),
        optional("detail", Kind::Rest),
    ],
};

/// The lines that a workload's prompts share, as hashes: they are not compared.
pub static TEMPLATES: TableSpec = TableSpec {
    name: "templates",
    columns: &[
        required("workload", Kind::Word),
        required("line", Kind::Long),
        required("round", Kind::Word),
        optional("detail", Kind::Rest),
    ],
};

/// Which gate cluster was spent in which trial.
pub static GATE_USAGE: TableSpec = TableSpec {
    name: "gate_usage",
    columns: &[
        required("cluster", Kind::Id),
        required("trial", Kind::Word),
        required("step", Kind::Long),
        optional("time", Kind::Time),
        optional("detail", Kind::Rest),
    ],
};

/// Sampled answers with everything needed to score and to train on them.
pub static CANDIDATES: TableSpec = TableSpec {
    name: "candidates",
    columns: &[
        required("purpose", Kind::Word),
        optional("round", Kind::Word),
        optional("trial", Kind::Word),
        optional("iteration", Kind::Int),
        optional("side", Kind::Word),
        optional("cluster", Kind::Id),
        required("prompt_hash", Kind::Id),
        optional("workload", Kind::Word),
        required("sample", Kind::Int),
        // Decimal text: a seed has 64 bits, a Delta long one fewer.
        required("seed", Kind::Id),
        optional("sampler", Kind::Word),
        optional("strategy", Kind::Word),
        required("text", Kind::Text),
        optional("token_ids", Kind::Ints),
        optional("logprobs", Kind::Floats),
        optional("sampler_logprobs", Kind::Floats),
        required("finish_reason", Kind::Word),
        optional("rewards", Kind::Json),
        optional("total", Kind::Double),
        optional("passed", Kind::Bool),
        optional("time", Kind::Time),
        optional("detail", Kind::Rest),
    ],
};

/// Every optimizer step of training: what it learnt from and how far it went.
pub static TUNING_STEPS: TableSpec = TableSpec {
    name: "tuning_steps",
    columns: &[
        required("round", Kind::Word),
        required("iteration", Kind::Int),
        required("step", Kind::Long),
        required("time", Kind::Time),
        required("epoch", Kind::Long),
        required("samples", Kind::Long),
        required("tokens", Kind::Long),
        required("learning_rate", Kind::Double),
        required("loss", Kind::Double),
        required("grad_norm", Kind::Double),
        required("kl_sample", Kind::Double),
        required("entropy", Kind::Double),
        required("ratio", Kind::Double),
        required("clipped", Kind::Double),
        optional("detail", Kind::Rest),
    ],
};

/// One row per change of a round's state.
pub static ROUNDS: TableSpec = TableSpec {
    name: "rounds",
    columns: &[
        required("round", Kind::Word),
        required("state", Kind::Word),
        required("time", Kind::Time),
        optional("reason", Kind::Text),
        optional("seed", Kind::Id),
        optional("detail", Kind::Rest),
    ],
};

/// One row per change of a trial's state.
pub static TRIALS: TableSpec = TableSpec {
    name: "trials",
    columns: &[
        required("trial", Kind::Word),
        required("state", Kind::Word),
        required("time", Kind::Time),
        optional("number", Kind::Long),
        optional("challenger", Kind::Word),
        optional("incumbent", Kind::Word),
        optional("reason", Kind::Text),
        optional("detail", Kind::Rest),
    ],
};

/// Every paired observation of a trial and the evidence after it.
pub static GATE_STEPS: TableSpec = TableSpec {
    name: "gate_steps",
    columns: &[
        required("trial", Kind::Word),
        required("step", Kind::Long),
        required("time", Kind::Time),
        optional("cluster", Kind::Id),
        optional("prompt_hash", Kind::Id),
        optional("workload", Kind::Word),
        optional("d", Kind::Double),
        optional("lambda", Kind::Double),
        optional("ln_wealth", Kind::Double),
        optional("verdict", Kind::Word),
        optional("reason", Kind::Text),
        optional("detail", Kind::Rest),
    ],
};

/// Promotions, refusals, rollbacks and overrides, with the numbers behind them.
pub static PROMOTIONS: TableSpec = TableSpec {
    name: "promotions",
    columns: &[
        required("id", Kind::Id),
        required("action", Kind::Word),
        required("time", Kind::Time),
        optional("version", Kind::Word),
        optional("previous", Kind::Word),
        optional("trial", Kind::Word),
        optional("reason", Kind::Text),
        optional("detail", Kind::Rest),
    ],
};

/// What was erased and must not come back: hashes only.
pub static SUPPRESSIONS: TableSpec = TableSpec {
    name: "suppressions",
    columns: &[
        required("kind", Kind::Word),
        required("key_hash", Kind::Id),
        required("time", Kind::Time),
        required("receipt", Kind::Id),
    ],
};

/// The prompts that an erasure took rows of, as hashes: daemons that read this log take them out of their own tables.
pub static ERASED_PROMPTS: TableSpec = TableSpec {
    name: "erased_prompts",
    columns: &[required("receipt", Kind::Id), required("prompt_hash", Kind::Id), required("time", Kind::Time)],
};

impl Column {
    fn arrow_type(&self) -> DataType {
        let list = |item| DataType::List(Arc::new(Field::new("element", item, true)));
        match self.kind {
            Kind::Bool => DataType::Boolean,
            Kind::Int => DataType::Int32,
            Kind::Long => DataType::Int64,
            Kind::Double => DataType::Float64,
            Kind::Time => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
            Kind::Date => DataType::Date32,
            Kind::Word | Kind::Id | Kind::Text | Kind::Json | Kind::Rest => DataType::Utf8,
            Kind::Ints => list(DataType::Int32),
            Kind::Floats => list(DataType::Float32),
            Kind::Bytes => DataType::Binary,
        }
    }

    fn delta_type(&self) -> Value {
        let list = |item: &str| json!({ "type": "array", "elementType": item, "containsNull": true });
        match self.kind {
            Kind::Bool => json!("boolean"),
            Kind::Int => json!("integer"),
            Kind::Long => json!("long"),
            Kind::Double => json!("double"),
            Kind::Time => json!("timestamp"),
            Kind::Date => json!("date"),
            Kind::Word | Kind::Id | Kind::Text | Kind::Json | Kind::Rest => json!("string"),
            Kind::Ints => list("integer"),
            Kind::Floats => list("float"),
            Kind::Bytes => json!("binary"),
        }
    }

    /// Returns true where a structure goes in as JSON text.
    pub(super) fn holds_json(&self) -> bool {
        matches!(self.kind, Kind::Json | Kind::Rest)
    }
}

impl TableSpec {
    /// Returns the Arrow schema of a batch for this table.
    pub fn arrow_schema(&self) -> SchemaRef {
        let fields: Vec<Field> = self.columns.iter().map(|c| Field::new(c.name, c.arrow_type(), !c.required)).collect();
        Arc::new(Schema::new(fields))
    }

    /// Returns the Delta schema as the log stores it.
    pub fn delta_schema(&self) -> Value {
        let field =
            |c: &Column| json!({ "name": c.name, "type": c.delta_type(), "nullable": !c.required, "metadata": {} });
        json!({ "type": "struct", "fields": self.columns.iter().map(field).collect::<Vec<_>>() })
    }

    /// Returns the names of the columns whose bounds stand in the log, comma-separated.
    pub fn stats_columns(&self) -> String {
        let names: Vec<&str> = self.columns.iter().filter(|c| c.stats).map(|c| c.name).collect();
        names.join(",")
    }

    /// Returns the column that takes fields without one of their own.
    pub(super) fn rest(&self) -> Option<&Column> {
        self.columns.iter().find(|c| c.kind == Kind::Rest)
    }

    pub(super) fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|c| c.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Name;

    #[test]
    fn bounds_in_the_log_never_hold_text_of_the_log() {
        for table in Name::ALL.map(Name::spec) {
            for column in table.columns.iter().filter(|c| c.stats) {
                let harmless = matches!(column.kind, Kind::Int | Kind::Long | Kind::Time | Kind::Date);
                assert!(harmless || column.name == "topic", "{}.{}", table.name, column.name);
            }
        }
    }

    #[test]
    fn names_are_unique_and_both_schemas_agree() {
        for table in Name::ALL.map(Name::spec) {
            let arrow = table.arrow_schema();
            let mut names: Vec<&str> = table.columns.iter().map(|c| c.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), table.columns.len(), "{}", table.name);
            let delta = table.delta_schema();
            for (field, described) in arrow.fields().iter().zip(delta["fields"].as_array().unwrap()) {
                assert_eq!(described["name"], json!(field.name()));
                assert_eq!(described["nullable"], json!(field.is_nullable()));
            }
        }
    }
}
