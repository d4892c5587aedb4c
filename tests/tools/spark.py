"""One Spark session that does what it is told: JSON requests on standard input, one JSON answer a line on standard output.

usage: spark.py JARS

Requests: {"sql": TEXT} answers {"rows": [...]}; {"read": FOLDER} answers {"version", "rows", "sha256"} over all rows and
columns; {"txns": FOLDER} answers {APP_ID: VERSION}. Whatever Spark refuses answers {"error": TEXT}.
"""

import glob
import json
import os
import sys
import time

os.environ.update(TZ="UTC", SPARK_LOCAL_IP="127.0.0.1")
time.tzset()

from pyspark.sql import SparkSession

from digest import digest

SETTINGS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    "spark.ui.enabled": "false",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    # Small tables: one task a step is faster than the 200 and 50 of a cluster.
    "spark.sql.shuffle.partitions": "1",
    "spark.databricks.delta.snapshotPartitions": "1",
}


def start(jars):
    builder = SparkSession.builder.master("local[1]").config("spark.jars", ",".join(glob.glob(f"{jars}/*.jar")))
    for key, value in SETTINGS.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    return session


def answer(session, request):
    if "sql" in request:
        return {"rows": [row.asDict(recursive=True) for row in session.sql(request["sql"]).collect()]}
    log_of = session._jvm.org.apache.spark.sql.delta.DeltaLog.forTable
    if "read" in request:
        snapshot = log_of(session._jsparkSession, request["read"]).update(False, session._jvm.scala.Option.empty(),
                                                                          session._jvm.scala.Option.empty())
        found = session.read.format("delta").load(request["read"])
        return {"version": snapshot.version(), **digest(map(tuple, found.collect()))}
    snapshot = log_of(session._jsparkSession, request["txns"]).unsafeVolatileSnapshot()
    ids = snapshot.transactions()
    return {pair._1(): pair._2() for pair in (ids.toList().apply(i) for i in range(ids.size()))}


def main():
    # The JVM writes to the inherited standard output: the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session = start(sys.argv[1])
    for line in sys.stdin:
        try:
            said = answer(session, json.loads(line))
        except Exception as error:
            said = {"error": str(error).split("\n\tat ")[0]}
        print(json.dumps(said, default=str), file=answers, flush=True)
    session.stop()


main()
