use super::*;
use crate::gate::verdict::tests::passed_for;
use crate::signature::SigningKey;

/// A registry in a folder of its own, with a way to make adapters.
struct Desk {
    folder: tempfile::TempDir,
    registry: Registry,
}

impl Desk {
    fn new() -> Desk {
        let folder = tempfile::tempdir().unwrap();
        let registry = Registry::open(&folder.path().join("registry"), &Settings::default()).unwrap();
        Desk { folder, registry }
    }

    fn peft(&self, weights: &str, config: &str) -> PathBuf {
        let folder = self.folder.path().join(format!("{weights}-{config}"));
        durable::create_folder(&folder).unwrap();
        fs::write(folder.join("adapter_model.safetensors"), weights).unwrap();
        fs::write(folder.join("adapter_config.json"), config).unwrap();
        fs::write(folder.join("notes.txt"), "no part of an adapter").unwrap();
        folder
    }

    fn register(&self, weights: &str) -> Manifest {
        self.registry.register(&self.peft(weights, "{}"), lineage()).unwrap()
    }

    fn served(&self) -> String {
        self.registry.current().unwrap().version
    }

    fn serve(&self, version: &str) {
        let intent = self.registry.override_promote(version, "operator", "a test", 5).unwrap();
        self.registry.complete(&intent, 6).unwrap();
        assert_eq!(self.served(), version);
    }

    fn events(&self) -> Vec<&'static str> {
        let name = |event: &Event| match event.what {
            Happened::Registered { .. } => "registered",
            Happened::Promoted { .. } => "promoted",
            Happened::Overridden { .. } => "overridden",
            Happened::RolledBack { .. } => "rolled back",
            Happened::Imported { .. } => "imported",
            Happened::Rebased { .. } => "rebased",
            Happened::Aborted { .. } => "aborted",
            Happened::Quarantined { .. } => "quarantined",
            Happened::Frozen { .. } => "frozen",
            Happened::Thawed { .. } => "thawed",
            Happened::CanaryBegan { .. } => "canary began",
            Happened::CanaryEnded { .. } => "canary ended",
        };
        self.registry.history().unwrap().iter().map(name).collect()
    }
}

fn lineage() -> Lineage {
    Lineage {
        base: Base { name: "tiny".into(), sha256: "b".into() },
        round: Some("r1".into()),
        dataset_sha256: Some("d".into()),
        tables: [("queries".to_string(), 7)].into(),
        offsets: vec![OffsetRange { topic: "log".into(), partition: 0, from: 0, to: 42 }],
        notes: Default::default(),
        created_us: 1,
    }
}

#[test]
fn an_adapter_is_registered_once_by_its_content() {
    let desk = Desk::new();
    let first = desk.register("a");
    assert_eq!(first.version, format!("taod-{}", &first.sha256[..12]));
    let again = desk.registry.register(&desk.peft("a", "{}"), Lineage { created_us: 99, ..lineage() }).unwrap();
    assert_eq!(again, first);
    assert_ne!(desk.registry.register(&desk.peft("a", "{ }"), lineage()).unwrap().version, first.version);
    assert_eq!(desk.registry.list().unwrap().len(), 2);
    let names: Vec<_> =
        fs::read_dir(desk.registry.path(&first.version)).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    assert_eq!(desk.registry.manifest(&first.version).unwrap().lineage, lineage());
    let error = desk.registry.register(desk.folder.path(), lineage()).unwrap_err();
    assert!(error.to_string().contains("lacks adapter_config.json"), "{error}");
}

#[test]
fn changed_bytes_are_noticed_and_odd_names_reach_no_file() {
    let desk = Desk::new();
    let version = desk.register("a").version;
    desk.registry.verify(&version).unwrap();
    fs::write(desk.registry.path(&version).join("adapter_model.safetensors"), "b").unwrap();
    assert!(matches!(desk.registry.verify(&version), Err(RegistryError::Corrupt { .. })));
    let refused = desk.registry.override_promote(&version, "operator", "x", 1);
    assert!(matches!(refused, Err(RegistryError::Corrupt { .. })));
    for name in ["../../etc", "", "base", "taod-", "taod-zzzzzzzzzzzz"] {
        assert!(matches!(desk.registry.manifest(name), Err(RegistryError::Unknown(_))), "{name}");
    }
}

#[test]
fn a_passed_trial_promotes_what_it_tried_over_what_it_was_tried_against() {
    let desk = Desk::new();
    let (a, b) = (desk.register("a"), desk.register("b"));
    let other = desk.registry.promote(&passed_for(&a.version, &b.sha256, BASE), None, 2);
    assert!(matches!(other, Err(RegistryError::OtherWeights { .. })));
    let passed = passed_for(&a.version, &a.sha256, BASE);
    let intent = desk.registry.promote(&passed, None, 2).unwrap();
    assert_eq!((intent.from(), intent.to(), desk.served().as_str()), (BASE, a.version.as_str(), BASE));
    assert!(matches!(desk.registry.promote(&passed, None, 2), Err(RegistryError::Underway(_))));
    desk.registry.complete(&intent, 3).unwrap();
    desk.registry.complete(&intent, 4).unwrap();
    let current = desk.registry.current().unwrap();
    assert_eq!((current.version, current.sha256, current.since_us), (a.version.clone(), Some(a.sha256), 3));
    let stale = desk.registry.promote(&passed_for(&b.version, &b.sha256, BASE), None, 5);
    assert!(matches!(stale, Err(RegistryError::OtherIncumbent { .. })));
    assert_eq!(desk.events(), ["registered", "registered", "promoted"]);
}

#[test]
fn an_approval_outlives_the_process_that_it_was_given_to() {
    let desk = Desk::new();
    let a = desk.register("a");
    let approval = Approval { by: "olga".into(), reason: "read the answers".into() };
    let passed = passed_for(&a.version, &a.sha256, BASE);
    desk.registry.promote(&passed, Some(approval.clone()), 2).unwrap();
    let reopened = Registry::open(&desk.folder.path().join("registry"), &Settings::default()).unwrap();
    let Recovery::Underway(found) = reopened.recover().unwrap() else { panic!("nothing is under way") };
    assert_eq!(*found.why(), Kind::Gated { trial: passed.trial().to_string(), approval: Some(approval) });
}

#[test]
fn an_aborted_promotion_changes_nothing_and_is_recorded() {
    let desk = Desk::new();
    let a = desk.register("a");
    let intent = desk.registry.promote(&passed_for(&a.version, &a.sha256, BASE), None, 2).unwrap();
    desk.registry.abort(&intent, "replica 2 answered 500", 3).unwrap();
    desk.registry.abort(&intent, "again", 4).unwrap();
    assert_eq!((desk.served().as_str(), desk.registry.recover().unwrap()), (BASE, Recovery::Clean));
    assert_eq!(desk.events(), ["registered", "aborted"]);
    // The old intent ends no later promotion.
    let later = desk.registry.promote(&passed_for(&a.version, &a.sha256, BASE), None, 5).unwrap();
    assert_ne!(later.promotion(), intent.promotion());
    assert!(matches!(desk.registry.complete(&intent, 6), Err(RegistryError::NotUnderway(_))));
}

#[test]
fn rollback_returns_step_by_step_and_bars_what_it_left() {
    let desk = Desk::new();
    let [a, b, c] = ["a", "b", "c"].map(|weights| desk.register(weights).version);
    for version in [&a, &b, &c] {
        desk.serve(version);
    }
    desk.registry.quarantine(&b, "bad tone", 7).unwrap();
    let intent = desk.registry.rollback("reward fell", 8).unwrap();
    assert_eq!(intent.to(), a, "b is quarantined");
    desk.registry.complete(&intent, 9).unwrap();
    let refused = desk.registry.override_promote(&c, "operator", "again", 10);
    assert!(matches!(refused, Err(RegistryError::Quarantined { .. })));
    let intent = desk.registry.rollback("still bad", 11).unwrap();
    desk.registry.complete(&intent, 12).unwrap();
    assert_eq!(desk.served(), BASE);
    assert!(matches!(desk.registry.rollback("once more", 13), Err(RegistryError::NothingBefore(_))));
    assert!(desk.registry.list().unwrap().iter().all(|listed| listed.quarantined.is_some() && !listed.served));
}

#[test]
fn quarantine_bars_the_weights_under_any_name() {
    let desk = Desk::new();
    let a = desk.register("a").version;
    desk.serve(&a);
    assert!(matches!(desk.registry.quarantine(&a, "x", 1), Err(RegistryError::Served { .. })));
    let b = desk.register("b").version;
    desk.registry.quarantine(&b, "leaks", 1).unwrap();
    desk.registry.quarantine(&b, "twice", 2).unwrap();
    let renamed = desk.registry.register(&desk.peft("b", "{ }"), lineage()).unwrap();
    let refused = desk.registry.promote(&passed_for(&renamed.version, &renamed.sha256, &a), None, 3).unwrap_err();
    assert!(refused.to_string().contains("leaks"), "{refused}");
    assert_eq!(desk.events().iter().filter(|event| **event == "quarantined").count(), 1);
}

#[test]
fn what_was_in_production_before_is_the_first_incumbent_and_only_the_first() {
    let desk = Desk::new();
    let [a, b] = ["a", "b"].map(|weights| desk.register(weights).version);
    let intent = desk.registry.import(&a, "operator", "it is there", 2).unwrap();
    desk.registry.complete(&intent, 3).unwrap();
    assert_eq!(desk.served(), a);
    assert!(matches!(desk.registry.import(&b, "operator", "x", 4), Err(RegistryError::InCharge { .. })));
    desk.serve(&b);
    let intent = desk.registry.rollback("worse", 7).unwrap();
    assert_eq!(intent.to(), a);
    desk.registry.complete(&intent, 8).unwrap();
    assert_eq!(desk.events()[2..], ["imported", "overridden", "quarantined", "rolled back"]);
}

#[test]
fn another_base_is_served_bare_and_adapters_of_the_former_one_are_refused() {
    let desk = Desk::new();
    let a = desk.register("a").version;
    desk.serve(&a);
    let base = |sha256: &str| Base { name: "tiny-2".into(), sha256: sha256.into() };
    assert!(matches!(desk.registry.new_base(base("b"), "operator", "x", 6), Err(RegistryError::SameBase(_))));
    let intent = desk.registry.new_base(base("c"), "operator", "a better base", 7).unwrap();
    desk.registry.complete(&intent, 8).unwrap();
    assert_eq!((desk.served().as_str(), desk.registry.base().unwrap()), (BASE, Some(base("c"))));
    let refused = desk.registry.override_promote(&a, "operator", "again", 9).unwrap_err();
    assert!(refused.to_string().contains("trained on tiny, but the base model is tiny-2 now"), "{refused}");
    assert!(matches!(desk.registry.rollback("back", 9), Err(RegistryError::NothingBefore(_))));
    let lineage = Lineage { base: base("c"), ..lineage() };
    let next = desk.registry.register(&desk.peft("n", "{}"), lineage).unwrap().version;
    desk.serve(&next);
    // From base to base there is nothing to move, but everything to record.
    let again = desk.registry.new_base(base("d"), "operator", "once more", 12).unwrap();
    desk.registry.complete(&again, 13).unwrap();
    let last = desk.registry.new_base(base("e"), "operator", "and again", 14).unwrap();
    assert!(!desk.registry.has_moved(&last).unwrap());
    desk.registry.complete(&last, 15).unwrap();
    assert_eq!(desk.events()[1..], ["overridden", "rebased", "registered", "overridden", "rebased", "rebased"]);
}

#[test]
fn a_quarantine_bars_the_records_that_only_what_it_bars_had_learnt_from() {
    let desk = Desk::new();
    let ranges = |to: &[i64]| -> Vec<OffsetRange> {
        let range = |(partition, to): (usize, &i64)| OffsetRange {
            topic: "log".into(),
            partition: partition as i32,
            from: 0,
            to: *to,
        };
        to.iter().enumerate().map(range).collect()
    };
    let register = |weights: &str, created_us, to: &[i64]| {
        let lineage = Lineage { offsets: ranges(to), created_us, ..lineage() };
        desk.registry.register(&desk.peft(weights, "{}"), lineage).unwrap().version
    };
    let [_, b, c] = [("a", 1, &[10, 10][..]), ("b", 2, &[15, 10][..]), ("c", 3, &[40, 10, 7][..])]
        .map(|(w, t, to)| register(w, t, to));
    desk.registry.quarantine(&b, "bad tone", 5).unwrap();
    let barred = || -> Vec<(i32, i64, i64)> {
        desk.registry.barred_records().unwrap().iter().map(|r| (r.partition, r.from, r.to)).collect()
    };
    assert_eq!(barred(), [(0, 10, 15)]);
    desk.registry.quarantine(&c, "worse", 6).unwrap();
    let mut all = barred();
    all.sort_unstable();
    // What the barred one had seen counts as not seen.
    assert_eq!(all, [(0, 10, 15), (0, 10, 40), (2, 0, 7)]);
}

#[test]
fn a_canary_is_kept_until_it_is_stopped_or_what_is_served_changes() {
    let desk = Desk::new();
    let [a, b, c] = ["a", "b", "c"].map(|weights| desk.register(weights).version);
    desk.serve(&a);
    let begin = |version: &str, percent| desk.registry.begin_canary(version, percent, "operator", "a try", 7);
    assert!(matches!(begin(&a, 10), Err(RegistryError::AlreadyServed { .. })));
    for percent in [0, 51] {
        assert!(matches!(begin(&b, percent), Err(RegistryError::Percent(p)) if p == percent));
    }
    begin(&b, 10).unwrap();
    assert!(matches!(begin(&c, 10), Err(RegistryError::OtherCanary(there)) if there == b));
    assert!(!desk.registry.retired(i64::MAX).unwrap().contains(&b));
    assert!(desk.registry.end_canary("enough", false, 8).unwrap().is_some_and(|ended| ended.version == b));
    assert!(desk.registry.end_canary("enough", false, 9).unwrap().is_none());
    begin(&c, 50).unwrap();
    assert!(matches!(desk.registry.quarantine(&c, "bad", 9), Err(RegistryError::OtherCanary(there)) if there == c));
    let intent = desk.registry.override_promote(&b, "operator", "a test", 9).unwrap();
    assert!(matches!(desk.registry.quarantine(&b, "bad", 9), Err(RegistryError::Underway(to)) if to == b));
    desk.registry.abort(&intent, "a test", 9).unwrap();
    desk.serve(&b);
    assert_eq!(desk.registry.canary().unwrap(), None);
    let events =
        ["overridden", "canary began", "canary ended", "canary began", "aborted", "overridden", "canary ended"];
    assert_eq!(desk.events()[3..], events);
}

#[test]
fn a_canary_that_earns_less_is_stopped_and_barred_at_once() {
    let desk = Desk::new();
    let [a, b] = ["a", "b"].map(|weights| desk.register(weights).version);
    desk.serve(&a);
    desk.registry.begin_canary(&b, 10, "operator", "a try", 7).unwrap();
    desk.registry.end_canary("it earns less", true, 8).unwrap();
    let again = desk.registry.begin_canary(&b, 10, "operator", "a try", 9);
    assert!(matches!(again, Err(RegistryError::Quarantined { reason, .. }) if reason == "it earns less"));
}

#[test]
fn one_at_a_time_has_the_turn() {
    let desk = Desk::new();
    let turn = desk.registry.turn().unwrap();
    assert!(turn.is_some() && desk.registry.turn().unwrap().is_none());
    drop(turn);
    assert!(desk.registry.turn().unwrap().is_some());
}

#[test]
fn a_version_is_retired_once_nothing_led_to_it_for_long_enough() {
    let desk = Desk::new();
    let [a, b] = ["a", "b"].map(|weights| desk.register(weights).version);
    desk.serve(&a);
    assert_eq!(desk.registry.retired(6).unwrap(), std::slice::from_ref(&b));
    desk.serve(&b); // at time 6
    assert!(desk.registry.retired(6).unwrap().is_empty());
    assert_eq!(desk.registry.retired(7).unwrap(), [a]);
}

/// Registers, promotes and rolls back; the first error ends it.
fn whole_life(desk: &Desk, folder: &Path) -> Result<(), RegistryError> {
    let a = desk.registry.register(folder, lineage())?;
    match desk.registry.recover()? {
        Recovery::Clean => {}
        Recovery::Underway(intent) | Recovery::Moved(intent) => desk.registry.complete(&intent, 9)?,
    }
    let served_once = || -> Result<bool, RegistryError> {
        Ok(desk.registry.history()?.iter().any(|e| matches!(e.what, Happened::Promoted { .. })))
    };
    if !served_once()? {
        let intent = desk.registry.promote(&passed_for(&a.version, &a.sha256, BASE), None, 2)?;
        desk.registry.complete(&intent, 3)?;
    }
    if desk.registry.current()?.version == a.version {
        let intent = desk.registry.rollback("a test", 4)?;
        desk.registry.complete(&intent, 5)?;
    }
    Ok(())
}

#[test]
fn a_kill_between_any_two_writes_leaves_a_registry_that_reads_and_goes_on() {
    let mut kills = 0;
    for writes in 0.. {
        let desk = Desk::new();
        let folder = desk.peft("a", "{}");
        disk::plug::after(Some(writes));
        let result = whole_life(&desk, &folder);
        disk::plug::after(None);
        // What any reader sees after the kill: everything parses, what is listed is whole, what is served is registered.
        for listed in desk.registry.list().unwrap() {
            desk.registry.verify(&listed.version).unwrap();
        }
        let served = desk.served();
        assert!(served == BASE || desk.registry.verify(&served).is_ok());
        desk.registry.history().unwrap();
        whole_life(&desk, &folder).unwrap();
        assert_eq!((desk.served().as_str(), desk.registry.recover().unwrap()), (BASE, Recovery::Clean));
        assert_eq!(
            desk.events(),
            ["registered", "promoted", "quarantined", "rolled back"],
            "killed before write {writes}"
        );
        match result {
            Ok(()) => break,
            Err(_) => kills += 1,
        }
    }
    assert_eq!(kills, 14, "a write was added or lost: is it safe to be killed before it?");
}

#[test]
fn a_torn_line_of_the_history_never_happened() {
    let desk = Desk::new();
    desk.register("a");
    let path = desk.registry.history_path();
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{whole}{{\"time_us\":1,\"eve")).unwrap();
    assert_eq!(desk.events(), ["registered"]);
    desk.register("b");
    assert_eq!(desk.events(), ["registered", "registered"]);
    fs::write(&path, "garbage\n").unwrap();
    assert!(desk.registry.history().unwrap_err().to_string().contains("history.jsonl"));
}

#[test]
fn a_freeze_stops_the_gate_and_not_the_operator() {
    let desk = Desk::new();
    let new = desk.register("new");
    let key = passed_for(&new.version, &new.sha256, BASE);
    desk.registry.freeze("the audit disagrees", "audit", 1).unwrap();
    desk.registry.freeze("another reason", "someone", 2).unwrap();
    assert_eq!(desk.registry.frozen().unwrap().unwrap().reason, "the audit disagrees");
    let error = desk.registry.promote(&key, None, 3).unwrap_err();
    assert!(error.to_string().contains("frozen by audit (the audit disagrees)"), "{error}");
    desk.serve(&new.version);
    let next = desk.register("next");
    desk.registry.thaw("labelled again", "someone", 4).unwrap();
    desk.registry.thaw("twice", "someone", 4).unwrap();
    assert_eq!(desk.registry.frozen().unwrap(), None);
    let key = passed_for(&next.version, &next.sha256, &new.version);
    desk.registry.complete(&desk.registry.promote(&key, None, 7).unwrap(), 8).unwrap();
    assert_eq!(desk.served(), next.version);
    let events = desk.events();
    assert_eq!(events.iter().filter(|e| ["frozen", "thawed"].contains(*e)).count(), 2, "{events:?}");
}

/// A registry that signs by a key of its own and trusts it, beside one of the same folder that trusts somebody else's.
struct Signing {
    desk: Desk,
    /// What an attacker or a colleague has: another key, in its file.
    other: Settings,
}

impl Signing {
    fn new() -> Signing {
        let mut desk = Desk::new();
        let [own, other] = ["own", "other"].map(|name| {
            let signing_key_file = desk.folder.path().join(format!("{name}.pem"));
            let trusted_keys = vec![SigningKey::generate(&signing_key_file).unwrap().to_string()];
            Settings { signing_key_file, trusted_keys, ..Settings::default() }
        });
        desk.registry.settings = own;
        Signing { desk, other }
    }

    fn refusal(&self, version: &str) -> RegistryError {
        let refused = self.desk.registry.verify(version).unwrap_err();
        let promoted = self.desk.registry.override_promote(version, "operator", "a test", 5).unwrap_err();
        assert_eq!(refused.to_string(), promoted.to_string(), "what cannot be loaded cannot be promoted");
        refused
    }
}

#[test]
fn a_version_is_signed_as_it_is_registered_and_refused_once_anything_of_it_differs() {
    let signing = Signing::new();
    let (a, b) = (signing.desk.register("a").version, signing.desk.register("b").version);
    signing.desk.registry.verify(&a).unwrap();
    let file = |version: &str, name: &str| signing.desk.registry.path(version).join(name);
    // The other version's signature is none of this one's.
    let own = fs::read(file(&a, "manifest.sig")).unwrap();
    fs::copy(file(&b, "manifest.sig"), file(&a, "manifest.sig")).unwrap();
    assert!(matches!(signing.refusal(&a), RegistryError::Signature(SignatureError::Forged { .. })));
    fs::write(file(&a, "manifest.sig"), own).unwrap();
    // A whole version under another one's name.
    for name in ["manifest.json", "manifest.sig", "adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(file(&b, name), file(&a, name)).unwrap();
    }
    assert!(matches!(signing.refusal(&a), RegistryError::Manifest { .. }));
    // Other weights whose hash is put into the manifest: the hashes fit, the signature does not.
    let text = fs::read_to_string(file(&b, "manifest.json")).unwrap().replace("\"created_us\": 1", "\"created_us\": 2");
    fs::write(file(&b, "manifest.json"), text).unwrap();
    assert!(matches!(signing.refusal(&b), RegistryError::Signature(SignatureError::Forged { .. })));
}

#[test]
fn weights_that_were_changed_after_the_signature_are_refused() {
    let signing = Signing::new();
    let a = signing.desk.register("a").version;
    fs::write(signing.desk.registry.path(&a).join("adapter_model.safetensors"), "worse").unwrap();
    assert!(matches!(signing.refusal(&a), RegistryError::Corrupt { .. }));
}

#[test]
fn a_signature_by_a_key_that_is_not_trusted_or_none_at_all_is_refused_until_somebody_signs() {
    let mut signing = Signing::new();
    let a = signing.desk.register("a").version;
    let own = std::mem::replace(&mut signing.desk.registry.settings, signing.other.clone());
    assert!(matches!(signing.refusal(&a), RegistryError::Signature(SignatureError::Untrusted { .. })));
    fs::remove_file(signing.desk.registry.path(&a).join("manifest.sig")).unwrap();
    let refused = signing.refusal(&a).to_string();
    assert!(refused.contains("is not signed") && refused.contains("taod adapters sign"), "{refused}");
    assert_eq!(signing.desk.registry.signer(&a).unwrap(), None);
    signing.desk.registry.sign(&a).unwrap();
    signing.desk.registry.verify(&a).unwrap();
    assert_eq!(signing.desk.registry.signer(&a).unwrap().as_ref(), signing.other.trusted_keys.first());
    // A key that nobody here trusts makes no version that could never be loaded.
    let mixed = Settings { trusted_keys: own.trusted_keys, ..signing.other.clone() };
    signing.desk.registry.settings = mixed;
    let folder = signing.desk.peft("n", "{}");
    let refused = signing.desk.registry.register(&folder, lineage()).unwrap_err();
    assert!(matches!(refused, RegistryError::Signature(SignatureError::Untrusted { .. })), "{refused}");
    assert_eq!(signing.desk.registry.list().unwrap().len(), 1);
}

#[test]
fn a_key_that_others_may_read_registers_nothing() {
    use std::os::unix::fs::PermissionsExt;
    let signing = Signing::new();
    let file = &signing.desk.registry.settings.signing_key_file;
    fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
    let refused = signing.desk.registry.register(&signing.desk.peft("a", "{}"), lineage()).unwrap_err();
    assert!(matches!(refused, RegistryError::Signature(SignatureError::KeyOpen { .. })), "{refused}");
    assert_eq!(signing.desk.registry.list().unwrap(), []);
}

#[test]
fn registries_of_different_prefixes_never_give_the_same_name() {
    let mut desk = Desk::new();
    let a = desk.register("a").version;
    desk.registry.settings.name_prefix = "support-desk".into();
    let b = desk.register("a").version;
    assert_eq!((b.rsplit_once('-').unwrap().0, b.rsplit_once('-').unwrap().1), ("support-desk", &a["taod-".len()..]));
    desk.registry.verify(&a).unwrap();
    desk.registry.verify(&b).unwrap();
}
