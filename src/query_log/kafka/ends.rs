//! Which partitions an end stands for: the client tells the number of one, not of which topic it is.

use std::time::Duration;

use rdkafka::Offset;
use rdkafka::consumer::{BaseConsumer, Consumer as _};

use super::Context;
use crate::query_log::{Event, TopicPartition};

/// Returns the ends that an end of the partition with this number stands for.
///
/// Where several topics have such a partition, those whose end was told already are left out, and of each other one the
/// broker is asked: the client tells an end anew when partitions come and go beside it.
pub(super) fn ends(client: &BaseConsumer<Context>, partition: i32) -> Vec<Event> {
    let Ok(positions) = client.position() else { return Vec::new() };
    let list = if positions.count() > 0 { positions.elements() } else { Vec::new() };
    let context = client.context();
    let (starts, told) = {
        let shared = context.lock();
        (shared.starts.clone(), shared.told.clone())
    };
    let numbered = list.iter().filter(|element| element.partition() == partition);
    let places = numbered.map(|element| {
        let place = TopicPartition::new(element.topic(), partition);
        let next = match element.offset() {
            Offset::Offset(next) => Some(next),
            // Nothing was served yet: it is where it began.
            _ => starts.get(&place).copied(),
        };
        (place, next)
    });
    let places: Vec<_> = places.collect();
    let several = places.len() > 1;
    let mut events = Vec::new();
    for (place, next) in places {
        // The session is over, and each question may take a second.
        if context.events.is_closed() {
            break;
        }
        let was_told = next.is_some() && told.get(&place) == next.as_ref();
        if several && (was_told || !is_at_end(client, &place, next)) {
            continue;
        }
        if let Some(next) = next {
            context.lock().told.insert(place.clone(), next);
        }
        events.push(Event::End { partition: place, next });
    }
    events
}

/// Asks the broker whether a position is the end of its partition.
fn is_at_end(client: &BaseConsumer<Context>, place: &TopicPartition, next: Option<i64>) -> bool {
    let Some(next) = next else { return false };
    let extent = client.fetch_watermarks(&place.topic, place.partition, Duration::from_secs(1));
    extent.is_ok_and(|(_, end)| next >= end)
}
