//! The values that labels may take. There are no others: a label is an enum, never text of the log.

/// An enum that can be the label of a metric.
pub trait Label: Copy + 'static {
    /// The label's name.
    const NAME: &'static str;
    /// All its values.
    const ALL: &'static [Self];
    /// Returns the value as it is exported.
    fn as_str(self) -> &'static str;
    /// Returns the place of this value in `ALL`.
    fn index(self) -> usize;
}

macro_rules! label {
    ($(#[$doc:meta])* $label:ident as $name:literal { $($value:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $label { $($value,)* }

        impl Label for $label {
            const NAME: &'static str = $name;
            const ALL: &'static [Self] = &[$($label::$value,)*];

            fn as_str(self) -> &'static str {
                match self { $($label::$value => $text,)* }
            }

            fn index(self) -> usize {
                self as usize
            }
        }

        impl $label {
            /// Returns the value of this exported name.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.as_str() == name)
            }
        }
    };
}

label! {
    /// Why a record is no row: a dead letter, or nothing for the table. The codes of the log formats; a code that is not
    /// listed counts as `other`.
    Reason as "reason" {
        Empty = "empty",
        NotJson = "not_json",
        InvalidUtf8 = "invalid_utf8",
        TooDeep = "too_deep",
        BadNumber = "bad_number",
        TooManyItems = "too_many_items",
        UnknownFormat = "unknown_format",
        MissingMessages = "missing_messages",
        BadMessages = "bad_messages",
        BadRequest = "bad_request",
        MissingRequestId = "missing_request_id",
        NotChat = "not_chat",
        NoContent = "no_content",
        BadCompression = "bad_compression",
        TooLarge = "too_large",
        Erased = "erased",
        OtherEndpoint = "other_endpoint",
        Other = "other",
    }
}

label! {
    /// How a commit ended.
    Commit as "outcome" {
        Committed = "committed",
        Fenced = "fenced",
        Failed = "failed",
    }
}

label! {
    /// What of the prompts' population is watched.
    Feature as "feature" {
        Workload = "workload",
        Tenant = "tenant",
        Language = "language",
        Length = "length",
        Turns = "turns",
        Tools = "tools",
        Words = "words",
    }
}

label! {
    /// The stages of a round and of a trial, in their order.
    Stage as "stage" {
        Dataset = "dataset",
        Candidates = "candidates",
        Rewards = "rewards",
        Adapter = "adapter",
        Gate = "gate",
        Promotion = "promotion",
    }
}

label! {
    /// How a night ended: with a challenger to promote, with one refused or still on trial, or without one.
    RoundOutcome as "outcome" {
        Promote = "promote",
        Refused = "refused",
        Open = "open",
        Skipped = "skipped",
        Failed = "failed",
    }
}

label! {
    /// The splits of a dataset.
    Split as "split" {
        Train = "train",
        Gate = "gate",
        Audit = "audit",
    }
}

label! {
    /// The guardrails of the gate.
    Guardrail as "guardrail" {
        Length = "length",
        Kl = "kl",
        KlRound = "kl_round",
        Quality = "quality",
        Cost = "cost",
        Behaviour = "behaviour",
        Segments = "segments",
        Head = "head",
        Regression = "regression",
        Memorisation = "memorisation",
        Injection = "injection",
    }
}

label! {
    /// How a trial ended.
    TrialOutcome as "outcome" {
        Promoted = "promoted",
        Refused = "refused",
        Futile = "futile",
        Expired = "expired",
        Void = "void",
    }
}

label! {
    /// How a change of what is served ended.
    Promotion as "outcome" {
        Promoted = "promoted",
        Aborted = "aborted",
        RolledBack = "rolled_back",
        Quarantined = "quarantined",
    }
}

label! {
    /// The parts of the daemon that retry.
    Part as "part" {
        Ingest = "ingest",
        Schedule = "schedule",
        Round = "round",
        Promotion = "promotion",
        Admin = "admin",
        Lease = "lease",
        Maintenance = "maintenance",
        Telemetry = "telemetry",
    }
}

label! {
    /// What maintenance does to a table.
    MaintenanceTask as "task" {
        Retain = "retain",
        Compact = "compact",
        Vacuum = "vacuum",
        Sweep = "sweep",
        Checkpoint = "checkpoint",
        Clean = "clean",
    }
}

label! {
    /// How a task of maintenance ended.
    MaintenanceOutcome as "outcome" {
        Done = "done",
        Idle = "idle",
        Refused = "refused",
        Conflict = "conflict",
        Failed = "failed",
    }
}

label! {
    /// How a notice to a destination of `[[notifications]]` ended.
    Delivery as "outcome" {
        Delivered = "delivered",
        Failed = "failed",
    }
}
