use super::*;

fn circuit() -> Arc<Circuit> {
    let policy = CircuitPolicy {
        failures: 3,
        pause: Duration::from_millis(40),
        max_pause: Duration::from_millis(100),
        patience: Duration::from_secs(60),
    };
    Arc::new(Circuit::new("r.example".into(), policy))
}

fn refused() -> Error {
    let source = Arc::new(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
    let host = "r.example".to_owned();
    Error::Unreachable { host, source }
}

fn unavailable() -> Error {
    Error::Status {
        url: "r.example".to_owned(),
        status: 503,
        detail: String::new(),
        retry_after: None,
    }
}

fn acquire(circuit: &Arc<Circuit>) -> CircuitPermit {
    circuit.try_acquire(false, None).unwrap()
}

fn fail(circuit: &Arc<Circuit>) {
    acquire(circuit).record_failure(&refused());
}

fn succeed(circuit: &Arc<Circuit>) {
    let mut permit = acquire(circuit);
    permit.record_answer();
    permit.record_success();
}

fn retry_in(circuit: &Arc<Circuit>) -> Option<Duration> {
    match circuit.try_acquire(false, None) {
        Err(Error::CircuitOpen { retry_in, .. }) => Some(retry_in),
        _ => None,
    }
}

#[test]
fn failures_in_a_row_open_the_circuit_and_one_probe_closes_it() {
    let circuit = circuit();
    fail(&circuit);
    fail(&circuit);
    succeed(&circuit);
    fail(&circuit);
    fail(&circuit);
    assert!(retry_in(&circuit).is_none(), "an answer resets the count");
    fail(&circuit);
    assert!(retry_in(&circuit).is_some_and(|retry_in| retry_in <= Duration::from_millis(50)));
    std::thread::sleep(Duration::from_millis(60));
    let mut probe = acquire(&circuit);
    assert!(retry_in(&circuit).is_some(), "one probe at a time");
    probe.record_failure(&refused());
    drop(probe);
    assert!(retry_in(&circuit).is_some(), "the probe failed");
    std::thread::sleep(Duration::from_millis(110));
    drop(acquire(&circuit));
    succeed(&circuit);
    assert!(retry_in(&circuit).is_none() && retry_in(&circuit).is_none());
}

#[test]
fn pause_grows_up_to_its_maximum() {
    let circuit = circuit();
    for _ in 0..3 {
        fail(&circuit);
    }
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(105));
        fail(&circuit);
        assert!(retry_in(&circuit).is_some_and(|retry_in| retry_in <= Duration::from_millis(100)));
    }
}

#[test]
fn one_failure_opens_the_circuit_of_a_host_with_an_alternative() {
    let circuit = circuit();
    circuit
        .try_acquire(true, None)
        .map(|mut permit| permit.record_failure(&refused()))
        .unwrap();
    assert!(retry_in(&circuit).is_some());
}

#[test]
fn concurrent_fast_failures_count_once_and_slow_ones_individually() {
    let at_once = circuit();
    let permits: Vec<_> = (0..10).map(|_| acquire(&at_once)).collect();
    permits
        .into_iter()
        .for_each(|mut permit| permit.record_failure(&refused()));
    assert!(retry_in(&at_once).is_none());
    let silent = circuit();
    let permits: Vec<_> = (0..10).map(|_| acquire(&silent)).collect();
    std::thread::sleep(BURST_WINDOW);
    permits
        .into_iter()
        .for_each(|mut permit| permit.record_failure(&refused()));
    assert!(retry_in(&silent).is_some());
}

#[test]
fn headers_close_the_circuit_and_a_stalled_body_opens_it() {
    let circuit = circuit();
    (0..3).for_each(|_| fail(&circuit));
    std::thread::sleep(Duration::from_millis(60));
    let mut probe = acquire(&circuit);
    probe.record_answer();
    let mut other = acquire(&circuit);
    assert!(retry_in(&circuit).is_none(), "other requests do not wait for the body");
    other.record_failure(&refused());
    assert!(retry_in(&circuit).is_some(), "the failure count was kept");
    // The body of the earlier request has ended.
    probe.record_success();
    assert!(retry_in(&circuit).is_none());
}

#[test]
fn answered_ping_permits_one_request() {
    let circuit = circuit();
    let acquire = || circuit.try_acquire(true, None);
    acquire().unwrap().record_failure(&refused());
    std::thread::sleep(Duration::from_millis(60));
    let ping = acquire().unwrap();
    assert!(ping.needs_ping());
    ping.record_ping();
    let mut content = acquire().unwrap();
    content.record_answer();
    assert!(!content.needs_ping() && acquire().is_err());
    content.record_failure(&refused());
    drop(content);
    assert!(
        circuit.state.lock().pauses == 2 && acquire().is_err(),
        "the next pause is longer"
    );
    std::thread::sleep(Duration::from_millis(110));
    acquire().unwrap().record_ping();
    let mut content = acquire().unwrap();
    content.record_answer();
    content.record_progress();
    assert!(acquire().is_ok());
    content.record_success();
    assert_eq!(circuit.state.lock().pauses, 0);
}

#[test]
fn drop_after_the_deadline_counts_as_a_failure() {
    let circuit = circuit();
    drop(circuit.try_acquire(true, Some(Instant::now() + Duration::from_secs(60))));
    assert!(retry_in(&circuit).is_none(), "the caller gave up");
    drop(circuit.try_acquire(true, Some(Instant::now())));
    assert!(retry_in(&circuit).is_some());
}

#[tokio::test]
async fn waiters_take_turns_to_probe_and_all_go_on_once_a_probe_succeeds() {
    let circuit = circuit();
    (0..3).for_each(|_| fail(&circuit));
    let waiters: Vec<_> = (0..50)
        .map(|_| {
            let circuit = Arc::clone(&circuit);
            tokio::spawn(async move {
                let mut probes = 0;
                loop {
                    circuit.wait().await;
                    let Ok(mut permit) = circuit.try_acquire(false, None) else {
                        continue;
                    };
                    if !permit.is_probe {
                        return probes;
                    }
                    probes += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    // The third probe succeeds.
                    let pauses = circuit.state.lock().pauses;
                    match pauses {
                        1 | 2 => permit.record_failure(&refused()),
                        _ => permit.record_answer(),
                    }
                }
            })
        })
        .collect();
    let mut probes = 0;
    for waiter in waiters {
        probes += tokio::time::timeout(Duration::from_secs(30), waiter)
            .await
            .unwrap()
            .unwrap();
    }
    assert_eq!(probes, 3);
}

#[tokio::test]
async fn next_waiter_probes_if_the_one_whose_turn_it_is_has_gone() {
    let circuit = circuit();
    (0..3).for_each(|_| fail(&circuit));
    // Takes the turn, and does not use it.
    circuit.wait().await;
    let waited = tokio::time::timeout(Duration::from_secs(30), circuit.wait());
    waited.await.unwrap();
    assert!(acquire(&circuit).is_probe);
}

#[test]
fn open_circuit_tells_how_long_the_host_is_away_and_why() {
    let circuit = circuit();
    (0..3).for_each(|_| fail(&circuit));
    std::thread::sleep(Duration::from_millis(2));
    match circuit.try_acquire(false, None).err() {
        Some(error @ Error::CircuitOpen { away, .. }) => {
            assert!(away >= Duration::from_millis(2));
            assert!(error.is_outage(Duration::from_secs(60)) && !error.is_outage(away));
            let chain = ErrorChain(&error).to_string();
            assert!(chain.contains("cannot connect to r.example"), "{chain}");
        }
        error => panic!("{error:?}"),
    }
    std::thread::sleep(Duration::from_millis(60));
    succeed(&circuit);
    assert_eq!(circuit.state.lock().away(), Duration::ZERO);
}

#[test]
fn pauses_are_short_while_callers_wait() {
    let policy = |patience| CircuitPolicy {
        failures: 1,
        pause: Duration::from_secs(600),
        max_pause: Duration::from_secs(600),
        patience,
    };
    let pause = |patience, has_alternative| {
        let circuit = Arc::new(Circuit::new("r.example".into(), policy(patience)));
        let mut permit = circuit.try_acquire(has_alternative, None).unwrap();
        permit.record_failure(&refused());
        retry_in(&circuit).unwrap()
    };
    assert!(pause(Duration::from_secs(60), false) <= MAX_PATIENT_PAUSE);
    assert!(
        pause(Duration::ZERO, false) > MAX_PATIENT_PAUSE,
        "nothing waits any more"
    );
    assert!(
        pause(Duration::from_secs(60), true) > MAX_PATIENT_PAUSE,
        "another endpoint is asked"
    );
}

#[test]
fn unavailable_service_opens_the_circuit_only_if_a_ping_confirms_it() {
    let circuit = circuit();
    let answer = || acquire(&circuit).record_unavailable(&unavailable());
    assert_eq!([answer(), answer(), answer(), answer()], [false, false, true, false]);
    circuit.record_available();
    assert_eq!([answer(), answer(), answer()], [false, false, true]);
    assert!(retry_in(&circuit).is_none());
    circuit.record_unavailable(&unavailable());
    assert!(retry_in(&circuit).is_some());
    std::thread::sleep(Duration::from_millis(60));
    let mut probe = acquire(&circuit);
    assert!(
        probe.needs_ping(),
        "content of which the service is incapable proves nothing"
    );
    probe.record_own_ping();
    assert!(!probe.record_unavailable(&unavailable()));
    assert!(retry_in(&circuit).is_none(), "the ping was answered");
}

#[test]
fn unavailable_service_keeps_the_circuit_of_an_unreachable_host_open() {
    let circuit = circuit();
    (0..3).for_each(|_| fail(&circuit));
    std::thread::sleep(Duration::from_millis(60));
    let mut probe = acquire(&circuit);
    assert!(!probe.needs_ping());
    assert!(!probe.record_unavailable(&unavailable()));
    assert!(retry_in(&circuit).is_some());
}
