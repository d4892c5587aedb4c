//! The limit of what a consumer can do: reads a topic to its end and keeps nothing. For the ingestion bench.
//!
//! `consume BROKERS TOPIC`

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [brokers, topic] = arguments.as_slice() else { return Err("usage: consume BROKERS TOPIC".into()) };
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "consume")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "earliest")
        .set("enable.partition.eof", "true")
        .set("fetch.queue.backoff.ms", "10")
        .set("queued.max.messages.kbytes", "65536")
        .create()?;
    let metadata = client.fetch_metadata(Some(topic), std::time::Duration::from_secs(15))?;
    let mut open = metadata.topics().first().map_or(0, |topic| topic.partitions().len());
    client.subscribe(&[topic])?;
    let (mut records, mut bytes) = (0u64, 0u64);
    while open > 0 {
        match client.poll(std::time::Duration::from_millis(100)) {
            Some(Ok(message)) => {
                records += 1;
                bytes += message.payload_len() as u64;
            }
            Some(Err(KafkaError::PartitionEOF(_))) => open -= 1,
            Some(Err(error)) => return Err(error.into()),
            None => {}
        }
    }
    println!("{records} records, {bytes} bytes");
    Ok(())
}
