//! The files that the newest version names: there, whole, and as the log describes them.

use deltalake::Path;
use deltalake::logstore::object_store::{Error, ObjectStoreExt};
use futures::{StreamExt, TryStreamExt};
use parquet::arrow::ProjectionMask;
use parquet::errors::Result as ParquetResult;
use serde_json::Value;

use super::{Fault, Findings};
use crate::table::read::ListedFile;
use crate::table::schema::{Kind, TableSpec};
use crate::table::stored::StoredFile;
use crate::table::{Table, TableError, write};

/// Files looked at at a time.
const AT_ONCE: usize = 4;

/// Checks every active file; returns true where all can be read.
pub(super) async fn check(table: &mut Table, findings: &mut Findings) -> Result<bool, TableError> {
    let mut wrong = look_at_all(table).await?;
    let is_missing = |(fault, _): &(Fault, String)| *fault == Fault::FileMissing;
    if wrong.iter().any(is_missing) {
        // An erasure beside this deletes at once what it replaced: the newest version decides.
        table.refresh().await?;
        wrong = look_at_all(table).await?;
    }
    let mut whole = true;
    for (fault, detail) in wrong {
        whole &= !matches!(fault, Fault::FileMissing | Fault::FileUnreadable);
        findings.add(fault, detail);
    }
    Ok(whole)
}

async fn look_at_all(table: &Table) -> Result<Vec<(Fault, String)>, TableError> {
    let files = table.files().await?;
    let mut looks = futures::stream::iter(&files).map(|file| look(table, file)).buffered(AT_ONCE);
    let mut wrong = Vec::new();
    while let Some(found) = looks.next().await {
        wrong.extend(found?);
    }
    Ok(wrong)
}

async fn look(table: &Table, file: &ListedFile) -> Result<Vec<(Fault, String)>, TableError> {
    let ListedFile { path, size, stats, .. } = file;
    let store = table.log.object_store(None);
    let found = match store.head(&Path::from(path.as_str())).await {
        Ok(meta) => meta,
        Err(Error::NotFound { .. }) => return Ok(vec![(Fault::FileMissing, format!("{path} is not there"))]),
        Err(error) => return Err(TableError::store("cannot look for a file of", table.name(), error)),
    };
    let mut wrong = Vec::new();
    if found.size != *size {
        wrong.push((Fault::FileSize, format!("{path} has {} bytes, the log says {size}", found.size)));
    }
    let Some(claimed) = stats.as_deref().and_then(|text| serde_json::from_str::<Value>(text).ok()) else {
        return Ok(wrong);
    };
    match recompute(table, path, found.size).await {
        Ok(actual) => {
            wrong.extend(
                untrue(table.spec, &claimed, &actual).into_iter().map(|(f, what)| (f, format!("{path}: {what}"))),
            );
        }
        Err(error) => wrong.push((Fault::FileUnreadable, format!("{path}: {error}"))),
    }
    Ok(wrong)
}

/// Returns the statistics of a file by its rows.
async fn recompute(table: &Table, path: &str, size: u64) -> ParquetResult<Value> {
    let builder = StoredFile::open(&table.log, path, size).await?;
    let columns = table.spec.columns.iter().filter(|c| c.stats).map(|c| c.name);
    let mask = ProjectionMask::columns(builder.parquet_schema(), columns);
    let batches: Vec<_> = builder.with_projection(mask).build()?.try_collect().await?;
    Ok(serde_json::from_str(&write::stats(table.spec, &batches)).unwrap_or_default())
}

/// Returns what of the claimed statistics does not hold. Bounds may be wider than the values, never narrower.
fn untrue(spec: &TableSpec, claimed: &Value, actual: &Value) -> Vec<(Fault, String)> {
    let mut wrong = Vec::new();
    let mut differ = |what: &str, claimed: &Value, actual: &Value| {
        wrong.push((Fault::Statistics, format!("{what} is {actual}, the log says {claimed}")));
    };
    if claimed["numRecords"] != actual["numRecords"] {
        differ("the row count", &claimed["numRecords"], &actual["numRecords"]);
    }
    for column in spec.columns.iter().filter(|c| c.stats) {
        let name = column.name;
        let [nulls, min, max] =
            ["nullCount", "minValues", "maxValues"].map(|key| (&claimed[key][name], &actual[key][name]));
        if !nulls.0.is_null() && nulls.0 != nulls.1 {
            differ(&format!("the null count of {name}"), nulls.0, nulls.1);
        }
        if is_above(column.kind, min.0, min.1) {
            differ(&format!("the smallest {name}"), min.0, min.1);
        }
        if is_above(column.kind, max.1, max.0) && !is_truncated(column.kind, max.1, max.0) {
            differ(&format!("the largest {name}"), max.0, max.1);
        }
    }
    for key in ["minValues", "maxValues"] {
        let names = claimed[key].as_object().into_iter().flat_map(|bounds| bounds.keys());
        for name in names.filter(|name| spec.column(name).is_some_and(|column| !column.stats)) {
            wrong.push((Fault::TextInLog, format!("{key} holds {name}")));
        }
    }
    wrong
}

/// Returns true where both values are known and the first is the larger one.
fn is_above(kind: Kind, a: &Value, b: &Value) -> bool {
    match kind {
        Kind::Int | Kind::Long => a.as_i64().zip(b.as_i64()).is_some_and(|(a, b)| a > b),
        Kind::Time => time(a).zip(time(b)).is_some_and(|(a, b)| a > b),
        _ => a.as_str().zip(b.as_str()).is_some_and(|(a, b)| a > b),
    }
}

/// Returns true where a largest time was cut to its millisecond, as Spark does; readers of such statistics know that.
fn is_truncated(kind: Kind, actual: &Value, claimed: &Value) -> bool {
    matches!(kind, Kind::Time) && time(actual).zip(time(claimed)).is_some_and(|(actual, claimed)| actual - claimed == 1)
}

/// Returns a time in milliseconds, which is as exact as the log promises to be.
fn time(value: &Value) -> Option<i64> {
    chrono::DateTime::parse_from_rfc3339(value.as_str()?).ok().map(|time| time.timestamp_millis())
}
