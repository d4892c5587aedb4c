#!/bin/bash
# A throw-away Apache Kafka broker (KRaft, no ZooKeeper) from Maven Central jars, for tests.
#   kafka.sh get [MAVEN ARGUMENTS]      fetch the jars of pom.xml into the cache (-Dkafka.version=4.3.1)
#   kafka.sh have                       succeed if the jars are there
#   kafka.sh start DIR PORT [KEY=VAL..] format DIR if it is new, start, return once ready
#   kafka.sh stop DIR [-9]              stop and wait until it is gone; DIR keeps the data
# Listens on 127.0.0.1:PORT, controller on PORT+1. KEY=VAL: more lines for server.properties (the last
# one wins). Environment: HEAP=256m, FORMAT="more StorageTool arguments", WAIT=60 (seconds to be ready),
# TAOD_KAFKA_LIB (where the jars are; by default in the user's cache folder).
set -euf
here=$(cd "$(dirname "$0")" && pwd)
lib=${TAOD_KAFKA_LIB:-${XDG_CACHE_HOME:-$HOME/.cache}/taod/kafka/lib}
log=org.slf4j.simpleLogger
java=(java "-Xmx${HEAP:-256m}" -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -D$log.defaultLogLevel=warn
      -D$log.log.kafka.server.KafkaRaftServer=info -D$log.showDateTime=true "-D$log.dateTimeFormat=HH:mm:ss.SSS"
      -cp "$lib/*")
die() { echo "kafka.sh: $*" >&2; exit 1; }
# the pid in DIR/pid, if that process is (still) the broker of DIR
broker() { local p; p=$(cat "$1/pid" 2>/dev/null) && tr '\0' '\n' 2>/dev/null <"/proc/$p/cmdline" |
           grep -qxF "$1/server.properties" && echo "$p"; }

case "${1:-}" in
get)
  # Into a folder of its own first: lib is either whole or absent.
  shift; mkdir -p "$(dirname "$lib")"; part=$(mktemp -d "$lib.part.XXXXXX")
  mvn -q -B -f "$here/pom.xml" "$@" dependency:copy-dependencies "-DoutputDirectory=$part"
  rm -rf "$lib"; mv "$part" "$lib" ;;
have)
  [ -d "$lib" ] && command -v java >/dev/null ;;
start)
  [ $# -ge 3 ] || die "start DIR PORT [KEY=VAL..]"
  [ -d "$lib" ] || die "no jars in $lib: run '$0 get'"
  mkdir -p "$2"; dir=$(cd "$2" && pwd); port=$3; shift 3
  ! broker "$dir" >/dev/null || die "already running in $dir"
  { cat <<P
node.id=1
process.roles=broker,controller
listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$((port + 1))
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL,SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL
controller.quorum.voters=1@127.0.0.1:$((port + 1))
log.dirs=$dir/data
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
log.cleaner.dedupe.buffer.size=4194304
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
group.consumer.min.heartbeat.interval.ms=200
group.consumer.heartbeat.interval.ms=200
group.consumer.assignment.interval.ms=0
P
    [ $# -eq 0 ] || printf '%s\n' "$@"; } >"$dir/server.properties"
  [ -e "$dir/data/meta.properties" ] ||
    "${java[@]}" kafka.tools.StorageTool format -t YJKXaRF6SbiDaV4347JbdQ -c "$dir/server.properties" \
      ${FORMAT:-} >"$dir/format.log" 2>&1 || { cat "$dir/format.log" >&2; die "format failed"; }
  [ ! -e "$dir/log" ] || mv "$dir/log" "$dir/log.old"
  : >"$dir/log"
  nohup "${java[@]}" kafka.Kafka "$dir/server.properties" >"$dir/log" 2>&1 </dev/null &
  echo $! >"$dir/pid"
  for ((i = 0; i < ${WAIT:-60} * 10; i++)); do
    ! grep -q 'Kafka Server started' "$dir/log" || exit 0
    kill -0 $! 2>/dev/null || { cat "$dir/log" >&2; die "the broker ended"; }
    sleep 0.1
  done
  die "not ready after ${WAIT:-60} s; see $dir/log" ;;
stop)
  dir=$(cd "$2" && pwd); p=$(broker "$dir") || exit 0
  kill ${3:-} "$p"
  while grep -q '^State:[[:space:]]*[^ZX]' "/proc/$p/status" 2>/dev/null; do sleep 0.1; done
  rm -f "$dir/pid" ;;
*) sed -n '2,9s/^# //p' "$0"; exit 2 ;;
esac
