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
}

impl Name {
    /// All names, in the order of the flow.
    pub const ALL: [Name; 12] = [
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
    ];

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
}

impl Tables {
    /// Names the local folder `root`. Nothing is created until a table is opened.
    pub fn open(root: &Path) -> Result<Self, TableError> {
        Ok(Tables::at(TableLocation::parse(&root.to_string_lossy(), &BTreeMap::new())?))
    }

    /// Names a location.
    pub fn at(root: TableLocation) -> Self {
        Tables { root }
    }

    /// Returns where the tables lie.
    pub fn root(&self) -> &TableLocation {
        &self.root
    }

    /// Returns true where the table is there.
    pub async fn exists(&self, name: Name) -> Result<bool, TableError> {
        let location = self.root.join(name.spec().name);
        let found = location.log_store()?.is_delta_table_location().await;
        found.map_err(|e| TableError::store("cannot look for", &location, e))
    }

    /// Opens one table at its newest version, creating it where there is none.
    pub async fn open_one(&self, name: Name) -> Result<Table, TableError> {
        let spec = name.spec();
        Table::open_or_create(&self.root.join(spec.name), spec).await
    }

    /// Opens one table at its newest version, or returns nothing where there is none.
    pub async fn open_existing(&self, name: Name) -> Result<Option<Table>, TableError> {
        let spec = name.spec();
        Table::open_existing(&self.root.join(spec.name), spec).await
    }

    /// Looks at one table and changes nothing, neither its schema nor its place.
    pub async fn look(&self, name: Name) -> Result<Look, TableError> {
        let (spec, location) = (name.spec(), self.root.join(name.spec().name));
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
        let location = self.root.join(name.spec().name);
        let log = location.log_store()?;
        let exists = log.is_delta_table_location().await;
        Ok(exists.map_err(|e| TableError::store("cannot look for", &location, e))?.then_some(log))
    }
}
