//! Calls whose clients hang up while they wait for the whole answer: they end, and the log has them.

use std::sync::mpsc;

use serde_json::json;

use super::Settings;
use super::log::CallLog;
use super::tests::{Fake, consume};

#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_client_hangs_up_before_the_answer_is_logged_too() {
    let cluster = rdkafka::mocking::MockCluster::new(1).unwrap();
    cluster.create_topic("calls", 1, 1).unwrap();
    let brokers = cluster.bootstrap_servers();
    let settings = Settings { max_requests: 1, ..Settings::default() };
    let fake = Fake::with(settings, CallLog::open(&brokers, "calls").unwrap()).await;
    let busy = fake.busy.clone();
    let (locked, free) = (mpsc::channel(), mpsc::channel::<()>());
    let holder = std::thread::spawn(move || {
        let _held = busy.lock().unwrap();
        locked.0.send(()).unwrap();
        free.1.recv().unwrap_or_default();
    });
    locked.1.recv().unwrap();
    // One of two has the only place and waits; the other is turned away, which says so.
    let asked = [Box::pin(fake.chat(json!({}))), Box::pin(fake.chat(json!({})))];
    let ((status, _), _, waiting) = futures::future::select_all(asked).await;
    assert_eq!(status, 429);
    // The engine is still busy: nothing but the hang-up can end the call.
    drop(waiting);
    let rows = tokio::task::spawn_blocking(move || consume(&brokers, "calls", 2)).await.unwrap();
    let mut statuses: Vec<u64> = rows.iter().map(|(_, _, call)| call["status"].as_u64().unwrap()).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [429, 499]);
    let (_, _, gone) = rows.iter().find(|(_, _, call)| call["status"] == 499).unwrap();
    assert_eq!(gone["request"]["messages"][0]["content"], "hello there");
    free.0.send(()).unwrap();
    holder.join().unwrap();
    fake.stop().await;
}
