CREATE TABLE IF NOT EXISTS "public"."launches" (
  "id" varchar(24) NOT NULL,
  "date_utc" timestamptz NOT NULL,
  "links_patch" super,
  "mass" decimal(10,2),
  "ratio" double precision,
  "_run_id" varchar(64),
  "_loaded_at" timestamptz
)
DISTKEY ("id")
COMPOUND SORTKEY ("date_utc", "id");

CREATE TEMP TABLE "staging_1" (
  "id" varchar(24) NOT NULL,
  "date_utc" timestamptz NOT NULL,
  "links_patch" super,
  "mass" decimal(10,2),
  "ratio" double precision
)
DISTKEY ("id")
COMPOUND SORTKEY ("date_utc", "id");

COPY "staging_1" ("id", "date_utc", "links_patch", "mass", "ratio")
FROM 's3://bucket/spacex/public.launches/2024/02/29/20240229T235958.000007Z-0a1b2c3d/manifest.json'
IAM_ROLE default
REGION 'eu-west-1'
MANIFEST GZIP CSV IGNOREHEADER 1
NULL AS 'NULL-0a1b2c3d'
DATEFORMAT 'auto' TIMEFORMAT 'auto'
COMPUPDATE OFF STATUPDATE OFF;

SELECT rtrim("id")
FROM "staging_1"
GROUP BY rtrim("id")
HAVING count(*) > 1
LIMIT 5;

DELETE FROM "public"."launches";

INSERT INTO "public"."launches" ("id", "date_utc", "links_patch", "mass", "ratio", "_run_id", "_loaded_at")
SELECT "id", "date_utc", "links_patch", "mass", "ratio", '20240229T235958.000007Z-0a1b2c3d', GETDATE()
FROM "staging_1";

CREATE TABLE IF NOT EXISTS "spacex"."cores" (
  "launch_id" varchar(24),
  "position" smallint NOT NULL,
  "select" boolean,
  "_run_id" varchar(64),
  "_loaded_at" timestamptz
);

CREATE TEMP TABLE "staging_2" (
  "launch_id" varchar(24),
  "position" smallint NOT NULL,
  "select" boolean
);

COPY "staging_2" ("launch_id", "position", "select")
FROM 's3://bucket/spacex/spacex.cores/2024/02/29/20240229T235958.000007Z-0a1b2c3d/manifest.json'
IAM_ROLE default
REGION 'eu-west-1'
MANIFEST GZIP CSV IGNOREHEADER 1
NULL AS 'NULL-0a1b2c3d'
DATEFORMAT 'auto' TIMEFORMAT 'auto'
COMPUPDATE OFF STATUPDATE OFF;

SELECT rtrim("launch_id"), "position"
FROM "staging_2"
GROUP BY rtrim("launch_id"), "position"
HAVING count(*) > 1
LIMIT 5;

DELETE FROM "spacex"."cores"
USING "staging_2"
WHERE "spacex"."cores"."launch_id" = "staging_2"."launch_id" AND "spacex"."cores"."position" = "staging_2"."position";

INSERT INTO "spacex"."cores" ("launch_id", "position", "select", "_run_id", "_loaded_at")
SELECT "launch_id", "position", "select", '20240229T235958.000007Z-0a1b2c3d', GETDATE()
FROM "staging_2";

