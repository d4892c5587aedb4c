#!/bin/bash
# Keys and certificates for tests of a broker's security, by openssl, valid for two days:
#   certs.sh DIR
# ca.pem            the authority that signs everything below
# unknown-ca.pem    one that signed nothing the broker or the client shows
# broker.pem        key and certificate of the broker, for 127.0.0.1, in the one file that Kafka takes
# expired.pem       the same, expired years ago
# client.pem/.key   certificate and key of the client `taod`
# stranger.pem/.key the same, but signed by the unknown authority
# expired-client.pem/.key  the same as the client's, expired years ago
# token.key         key that signs tokens; token.pub its public half
set -euo pipefail
mkdir -p "$1" && cd "$1"
quiet() { openssl "$@" 2>openssl.log || { cat openssl.log >&2; exit 1; }; }

authority() { # NAME
  quiet req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=$1" -keyout "$1.key" -out "$1.pem"
  : >"$1.index"; echo 01 >"$1.serial"
}

# The only way of all versions of openssl to set both dates is its `ca`.
signed() { # NAME AUTHORITY START END: NAME.key and NAME.pem
  quiet req -newkey rsa:2048 -nodes -subj "/CN=${1#expired-}" -keyout "$1.key" -out "$1.csr"
  cat >ca.conf <<C
[ca]
default_ca = it
[it]
database = $2.index
serial = $2.serial
new_certs_dir = .
default_md = sha256
policy = any
x509_extensions = extensions
unique_subject = no
[any]
commonName = supplied
[extensions]
subjectAltName = IP:127.0.0.1,DNS:localhost
C
  quiet ca -batch -notext -config ca.conf -cert "$2.pem" -keyfile "$2.key" -startdate "$3" -enddate "$4" \
    -in "$1.csr" -out "$1.pem"
}

day() { date -u -d "$1" +%Y%m%d%H%M%SZ; }
yesterday=$(day yesterday) tomorrow=$(day tomorrow)
authority ca
authority unknown-ca
signed taod ca "$yesterday" "$tomorrow"
mv taod.pem client.pem; mv taod.key client.key
signed stranger unknown-ca "$yesterday" "$tomorrow"
signed expired-client ca 20200101000000Z 20200102000000Z
for name in broker expired; do
  [ $name = expired ] && dates="20200101000000Z 20200102000000Z" || dates="$yesterday $tomorrow"
  # shellcheck disable=SC2086
  signed $name ca $dates
  cat $name.key ca.pem >>$name.pem
done
quiet genrsa -out token.key 2048
quiet rsa -in token.key -pubout -out token.pub
