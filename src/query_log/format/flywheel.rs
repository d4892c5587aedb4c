//! NVIDIA's data flywheel: a pair of bodies, with the workload and the client that the flywheel trains for.
//!
//! Its schema is five fields and no more. A record with others beside them is a raw pair, which is read the same way.

use std::collections::BTreeMap;

use crate::record::Query;

use super::fields::Fields;
use super::{Refusal, openai};

/// All fields of its schema.
const FIELDS: [&str; 5] = ["timestamp", "workload_id", "client_id", "request", "response"];

/// Returns true where a record has the flywheel's fields and no others.
pub(super) fn is_flywheel(fields: &Fields) -> bool {
    let has_all = FIELDS[..4].iter().all(|name| fields.has(name));
    has_all && fields.names().all(|name| FIELDS.contains(&name))
}

/// Reads one record.
pub(super) fn read(fields: Fields, headers: &BTreeMap<String, String>) -> Result<Query, Refusal> {
    openai::read(fields, headers, "flywheel")
}
