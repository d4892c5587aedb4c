//! All tables under one root.

use std::collections::BTreeMap;
use std::path::Path;

use deltalake::logstore::LogStoreRef;

use super::schema::{self, TableSpec};
use super::{Table, TableError, TableLocation, evolve};

/// Names of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Name {
    Queries,
    DeadLetters,
    Splits,
    Templates,
    GateUsage,
    Candidates,
    TuningSteps,
    Rounds,
    Trials,
    GateSteps,
    Promotions,
    Suppressions,
    ErasedPrompts,
}

impl Name {
    /// All names, in the order of the flow.
    pub const ALL: [Name; 13] = [
        Name::Queries,
        Name::DeadLetters,
        Name::Splits,
        Name::Templates,
        Name::GateUsage,
        Name::Candidates,
        Name::TuningSteps,
        Name::Rounds,
        Name::Trials,
        Name::GateSteps,
        Name::Promotions,
        Name::Suppressions,
        Name::ErasedPrompts,
    ];

    /// Returns true for the tables of the log itself: what was logged, and what was erased of it.
    pub fn is_of_log(self) -> bool {
        matches!(self, Name::Queries | Name::DeadLetters | Name::Suppressions | Name::ErasedPrompts)
    }

    /// Returns what the table holds.
    pub fn spec(self) -> &'static TableSpec {
        match self {
            Name::Queries => &schema::QUERIES,
            Name::DeadLetters => &schema::DEAD_LETTERS,
            Name::Splits => &schema::SPLITS,
            Name::Templates => &schema::TEMPLATES,
            Name::GateUsage => &schema::GATE_USAGE,
            Name::Candidates => &schema::CANDIDATES,
            Name::TuningSteps => &schema::TUNING_STEPS,
            Name::Rounds => &schema::ROUNDS,
            Name::Trials => &schema::TRIALS,
            Name::GateSteps => &schema::GATE_STEPS,
            Name::Promotions => &schema::PROMOTIONS,
            Name::Suppressions => &schema::SUPPRESSIONS,
            Name::ErasedPrompts => &schema::ERASED_PROMPTS,
        }
    }
}

/// What [`Tables::look`] finds.
pub enum Look {
    Absent,
    /// An earlier taod made it: the next opening adds these columns.
    Older {
        lacking: Vec<String>,
    },
    Ready(Box<Table>),
}

/// The folder of tables. Cheap to clone; each table is opened on demand by whoever needs it.
#[derive(Clone)]
pub struct Tables {
    root: TableLocation,
    /// Where another daemon keeps the tables of the log, where one does.
    log: Option<TableLocation>,
}

impl Tables {
    /// Names the local folder `root`. Nothing is created until a table is opened.
    pub fn open(root: &Path) -> Result<Self, TableError> {
        Ok(Tables::at(TableLocation::parse(&root.to_string_lossy(), &BTreeMap::new())?))
    }

    /// Names a location.
    pub fn at(root: TableLocation) -> Self {
        Tables { root, log: None }
    }

    /// Takes the tables of the log from where another daemon keeps them. They can only be read.
    pub fn with_log_of_another(self, log: TableLocation) -> Self {
        Tables { log: Some(log), ..self }
    }

    /// Returns true where this daemon keeps a table: it writes, maintains and erases there.
    pub fn keeps(&self, name: Name) -> bool {
        self.log.is_none() || !name.is_of_log()
    }

    fn location(&self, name: Name) -> TableLocation {
        let root = self.log.as_ref().filter(|_| name.is_of_log()).unwrap_or(&self.root);
        root.join(name.spec().name)
    }

    /// Returns where the tables lie.
    pub fn root(&self) -> &TableLocation {
        &self.root
    }

    /// Returns true where the table is there.
    pub async fn exists(&self, name: Name) -> Result<bool, TableError> {
        let location = self.location(name);
        let found = location.log_store()?.is_delta_table_location().await;
        found.map_err(|e| TableError::store("cannot look for", &location, e))
    }

    /// Opens one table at its newest version, creating it where there is none and it is ours to make.
    pub async fn open_one(&self, name: Name) -> Result<Table, TableError> {
        if self.keeps(name) {
            return Table::open_or_create(&self.location(name), name.spec()).await;
        }
        self.open_existing(name).await?.ok_or_else(|| TableError::Refused {
            table: self.location(name).to_string(),
            why: "it is not there yet: start the daemon that keeps it, or correct state.log".to_owned(),
        })
    }

    /// Opens one table at its newest version, or returns nothing where there is none.
    pub async fn open_existing(&self, name: Name) -> Result<Option<Table>, TableError> {
        if self.keeps(name) {
            return Table::open_existing(&self.location(name), name.spec()).await;
        }
        // As it is: columns that it lacks are for its keeper to add.
        let Some(log) = self.log_of(name).await? else { return Ok(None) };
        Ok(Some(Table::attach(log, name.spec()).await?.for_reading()))
    }

    /// Looks at one table and changes nothing, neither its schema nor its place.
    pub async fn look(&self, name: Name) -> Result<Look, TableError> {
        let (spec, location) = (name.spec(), self.location(name));
        let Some(log) = self.log_of(name).await? else { return Ok(Look::Absent) };
        match Table::attach(log.clone(), spec).await {
            Err(error @ TableError::Schema { .. }) => {
                let lacking = evolve::lacking(&log, &location.to_string(), spec).await?;
                if lacking.is_empty() { Err(error) } else { Ok(Look::Older { lacking }) }
            }
            other => other.map(|table| Look::Ready(Box::new(table))),
        }
    }

    /// Returns the log of a table, or nothing where there is none.
    pub(super) async fn log_of(&self, name: Name) -> Result<Option<LogStoreRef>, TableError> {
        let location = self.location(name);
        let log = location.log_store()?;
        let exists = log.is_delta_table_location().await;
        Ok(exists.map_err(|e| TableError::store("cannot look for", &location, e))?.then_some(log))
    }
}
