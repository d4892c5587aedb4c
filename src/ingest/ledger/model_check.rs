//! A model check of the ledger: the code that runs in production, in every order of events that a small world allows.
//!
//! Two members share one group and two tables in memory. Step by step the explorer lets a member start, take a partition,
//! read a record, commit, lose its partition in order or without being told, die, or stop in the middle of a commit and
//! go on later, while the store refuses, lies about or delays single writes. After every step the tables must hold what
//! the [`world`] calls right. The first check takes every order up to a bound and visits equal states once; the second walks
//! at random, further and with more partitions. Either prints the way to a violation.

mod store;
mod world;

use std::collections::{HashSet, VecDeque};

use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use self::world::{Action, World};

/// Runs a way from the beginning. An error is a violation of what must hold, with the way that led to it.
async fn follow(partitions: i32, way: &[Action]) -> World {
    let mut world = World::new(partitions);
    for (at, action) in way.iter().enumerate() {
        world.step(action).await;
        if let Err(violation) = world.check().await {
            panic!("{violation}\nafter {:#?}", &way[..=at]);
        }
    }
    world
}

/// Visits every state that at most `depth` steps lead to, each once, until `most` are known. Returns how many.
async fn explore(partitions: i32, depth: usize, most: usize) -> usize {
    let mut known = HashSet::new();
    let mut ways = VecDeque::from([Vec::new()]);
    while let Some(way) = ways.pop_front() {
        let mut world = follow(partitions, &way).await;
        if !known.insert(world.fingerprint()) {
            continue;
        }
        if way.len() < depth && known.len() < most {
            ways.extend(world.enabled().into_iter().map(|action| [way.as_slice(), &[action]].concat()));
        }
        // Whatever happened: one member that is left alone brings everything home.
        if let Err(violation) = world.recover().await {
            panic!("{violation}\nwhen left alone after {way:#?}");
        }
    }
    known.len()
}

/// Walks at random and leaves the last member alone at the end.
async fn walk(partitions: i32, steps: usize, seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut world = World::new(partitions);
    let mut way = Vec::new();
    for _ in 0..steps {
        let actions = world.enabled();
        // Reading is what most of a life consists of; without it a walk is nothing but deaths.
        let quiet: Vec<&Action> = actions.iter().filter(|action| action.is_quiet()).collect();
        let choice = match quiet.choose(&mut random) {
            Some(quiet) if random.random_bool(0.5) => (*quiet).clone(),
            _ => actions.choose(&mut random).expect("a member that is down can always start").clone(),
        };
        way.push(choice.clone());
        world.step(&choice).await;
        if let Err(violation) = world.check().await {
            panic!("seed {seed}: {violation}\nafter {way:#?}");
        }
    }
    if let Err(violation) = world.recover().await {
        panic!("seed {seed}: {violation}\nwhen left alone after {way:#?}");
    }
}

/// Returns a bound from the environment, for runs that are longer than the tests'.
fn bound(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

#[tokio::test]
async fn every_order_of_events_up_to_a_bound_keeps_each_record_once() {
    let (depth, most) = (bound("TAOD_MODEL_DEPTH", 8), bound("TAOD_MODEL_STATES", 1500));
    let states = explore(1, depth as usize, most as usize).await;
    println!("{states} states within {depth} steps");
    assert!(states > 300, "the explorer has seen {states} states only");
}

#[tokio::test]
async fn long_walks_over_two_partitions_keep_each_record_once() {
    for seed in 0..bound("TAOD_MODEL_WALKS", 60) {
        walk(2, 40, seed).await;
    }
}
